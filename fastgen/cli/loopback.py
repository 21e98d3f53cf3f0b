"""Pages served to this machine alone: the address, and a check of the port."""

import socket

from fastgen.core.errors import UserError

HOST = "127.0.0.1"


def check_port(port: int) -> None:
    """Refuse a port that cannot be served on."""
    if not 1 <= port <= 65_535:
        raise UserError("--port", f"found {port}", "give 1 to 65535")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError("--port", f"{port} cannot be used ({error.strerror})", "give another") from None
