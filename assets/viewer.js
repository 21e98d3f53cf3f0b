"use strict";
// A viewer of 3D Gaussians: every figure.viewer holds buttons[data-splat] whose value is a .splat file in base64.
// Rows of 32 bytes: position and scale as float32 [3] each, colour and opacity as bytes [4], a quaternion (w first)
// as bytes [4]. The world is right-handed with z up; projection and blending are those of fastgen's rasteriser.
(() => {
const NEAR = 0.05, DILATION = 0.3, MOST = 0.999, LEAST = 1 / 255, FOVY = 47.5, GREY = 0.5, WIDTH = 1024;

const VERTEX = `#version 300 es
precision highp float;
precision highp sampler2D;
uniform sampler2D table;
uniform mat4 view;
uniform float focal, size;
in vec2 corner;
in float row;
out vec3 colour;
out vec2 place;
out float opacity;
vec4 entry(int k) {
  int i = int(row) * 4 + k;
  return texelFetch(table, ivec2(i % ${WIDTH}, i / ${WIDTH}), 0);
}
void main() {
  vec4 first = entry(0), second = entry(1), third = entry(2), last = entry(3);
  vec3 p = (view * vec4(first.xyz, 1.)).xyz;
  gl_Position = vec4(0., 0., 2., 1.);
  if (p.z < ${NEAR}) return;
  mat3 sigma = mat3(third.x, third.y, third.z, third.y, third.w, last.x, third.z, last.x, last.y);
  vec2 most = vec2(1.3 * .5 * size / focal);
  vec2 at = clamp(p.xy / p.z, -most, most) * p.z;
  mat3 J = mat3(focal / p.z, 0., 0., 0., focal / p.z, 0.,
    -focal * at.x / (p.z * p.z), -focal * at.y / (p.z * p.z), 0.);
  mat3 M = J * mat3(view);
  mat3 cov = M * sigma * transpose(M);
  float a = cov[0][0] + ${DILATION}, b = cov[0][1], c = cov[1][1] + ${DILATION};
  float mean = .5 * (a + c), gap = sqrt(max(.25 * (a - c) * (a - c) + b * b, 1e-9));
  vec2 axis = abs(b) < 1e-6 ? (a >= c ? vec2(1., 0.) : vec2(0., 1.)) : normalize(vec2(b, mean + gap - a));
  vec2 reach = 3.4 * sqrt(vec2(mean + gap, max(mean - gap, .05)));
  vec2 offset = corner.x * reach.x * axis + corner.y * reach.y * vec2(-axis.y, axis.x);
  vec2 pixel = focal * p.xy / p.z + offset;
  gl_Position = vec4(pixel.x / (.5 * size), -pixel.y / (.5 * size), 0., 1.);
  colour = second.rgb;
  opacity = first.w;
  place = 3.4 * corner;
}`;
const FRAGMENT = `#version 300 es
precision highp float;
in vec3 colour;
in vec2 place;
in float opacity;
out vec4 found;
void main() {
  float a = min(${MOST}, opacity * exp(-.5 * dot(place, place)));
  if (a < ${LEAST}) discard;
  found = vec4(colour * a, a);
}`;

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** Four texels for each splat: position and opacity, colour, and the covariance's six numbers. */
function tableOf(bytes) {
  const num = bytes.length / 32 | 0, floats = new DataView(bytes.buffer);
  const height = Math.max(1, Math.ceil(num * 4 / WIDTH)), table = new Float32Array(WIDTH * height * 4);
  for (let i = 0; i < num; i++) {
    const at = 32 * i, [x, y, z, sx, sy, sz] = [0, 4, 8, 12, 16, 20].map(k => floats.getFloat32(at + k, true));
    const q = [28, 29, 30, 31].map(k => (bytes[at + k] - 128) / 128), length = Math.hypot(...q) || 1;
    const [w, a, b, c] = q.map(v => v / length);
    const R = [[1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)],
      [2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)],
      [2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)]];
    const S = [sx * sx, sy * sy, sz * sz];
    const cov = (m, n) => R[m][0] * R[n][0] * S[0] + R[m][1] * R[n][1] * S[1] + R[m][2] * R[n][2] * S[2];
    const [red, green, blue, alpha] = [24, 25, 26, 27].map(k => bytes[at + k] / 255);
    table.set([x, y, z, alpha, red, green, blue, 0, cov(0, 0), cov(0, 1), cov(0, 2), cov(1, 1),
      cov(1, 2), cov(2, 2), 0, 0], 16 * i);
  }
  return { num, height, table };
}

function program(gl) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(made, shader);
  }
  gl.bindAttribLocation(made, 0, "corner");
  gl.bindAttribLocation(made, 1, "row");
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
  return made;
}

/** World to camera, OpenCV axes (x right, y down, z forward), by columns; the camera looks at the origin. */
function viewOf({ azimuth, elevation, distance }) {
  const [az, el] = [azimuth, elevation].map(v => v * Math.PI / 180);
  const out = [Math.cos(el) * Math.cos(az), Math.cos(el) * Math.sin(az), Math.sin(el)];
  const right = [-Math.sin(az), Math.cos(az), 0];
  const down = [Math.sin(el) * Math.cos(az), Math.sin(el) * Math.sin(az), -Math.cos(el)];
  const columns = [0, 1, 2].flatMap(k => [right[k], down[k], -out[k], 0]);
  return { matrix: new Float32Array([...columns, 0, 0, distance, 1]), forward: out.map(v => -v) };
}

function start(figure) {
  const canvas = figure.querySelector("canvas"), buttons = [...figure.querySelectorAll("button[data-splat]")];
  const gl = canvas.getContext("webgl2", { antialias: false, preserveDrawingBuffer: true });
  if (!gl) {
    figure.querySelector(".said").textContent = "This browser shows no WebGL 2; the turntable shows the same.";
    return;
  }
  const camera = { azimuth: +figure.dataset.azimuth || 0, elevation: +figure.dataset.elevation || 0,
    distance: +figure.dataset.distance || 2.2 };
  const shaders = program(gl), place = name => gl.getUniformLocation(shaders, name);
  const rows = gl.createBuffer(), texture = gl.createTexture();
  let shown = { num: 0, table: new Float32Array(0) }, order = new Float32Array(0), waits = false;
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
  gl.enableVertexAttribArray(0);
  gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
  gl.bindBuffer(gl.ARRAY_BUFFER, rows);
  gl.enableVertexAttribArray(1);
  gl.vertexAttribPointer(1, 1, gl.FLOAT, false, 0, 0);
  gl.vertexAttribDivisor(1, 1);
  gl.bindTexture(gl.TEXTURE_2D, texture);
  for (const key of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, key, gl.NEAREST);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.useProgram(shaders);

  function draw() {
    waits = false;
    const side = canvas.width, { matrix, forward } = viewOf(camera);
    const depth = i => {
      const at = 16 * i;
      return shown.table[at] * forward[0] + shown.table[at + 1] * forward[1] + shown.table[at + 2] * forward[2];
    };
    const depths = Float32Array.from({ length: shown.num }, (_, i) => depth(i));
    order = Float32Array.from({ length: shown.num }, (_, i) => i).sort((i, j) => depths[j] - depths[i]);
    gl.viewport(0, 0, side, side);
    gl.clearColor(GREY, GREY, GREY, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.bufferData(gl.ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
    gl.uniformMatrix4fv(place("view"), false, matrix);
    gl.uniform1f(place("focal"), .5 * side / Math.tan(.5 * FOVY * Math.PI / 180));
    gl.uniform1f(place("size"), side);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, shown.num);
  }
  function soon() {
    if (!waits) requestAnimationFrame(draw);
    waits = true;
  }
  function turn(right, up) {
    camera.azimuth -= right;
    camera.elevation = Math.max(-89, Math.min(89, camera.elevation + up));
    soon();
  }
  function nearer(factor) {
    camera.distance = Math.max(.3, Math.min(20, camera.distance * factor));
    soon();
  }
  function show(button) {
    for (const other of buttons) other.setAttribute("aria-pressed", other === button);
    shown = tableOf(bytesOf(button.dataset.splat));
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, WIDTH, shown.height, 0, gl.RGBA, gl.FLOAT, shown.table);
    soon();
  }

  const fingers = new Map();
  const apart = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a.x - b.x, a.y - b.y) || 1; };
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener("pointermove", event => {
    const from = fingers.get(event.pointerId);
    if (!from) return;
    const before = fingers.size === 2 ? apart() : 0, to = { x: event.clientX, y: event.clientY };
    fingers.set(event.pointerId, to);
    if (before) nearer(before / apart());
    else turn(.5 * (to.x - from.x), .5 * (to.y - from.y));
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, event => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("wheel", event => { event.preventDefault(); nearer(Math.exp(.001 * event.deltaY)); },
    { passive: false });
  canvas.addEventListener("keydown", event => {
    const way = { ArrowLeft: [6, 0], ArrowRight: [-6, 0], ArrowUp: [0, 6], ArrowDown: [0, -6] }[event.key];
    if (!way) return;
    event.preventDefault();
    turn(...way);
  });
  for (const button of buttons) button.addEventListener("click", () => show(button));
  if (buttons.length) show(buttons[0]);
}

for (const figure of document.querySelectorAll("figure.viewer")) start(figure);
})();
