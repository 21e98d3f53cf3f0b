"""Any diffusers denoiser as D(x_t, t, cond) -> x0, with its codec: loading, wrapping, adapters, JVP."""
