"""A TCP proxy in front of a server, that can turn bad: what networks and servers do to those who upload."""

import contextlib
import random
import socket
import threading

MODES = ("pass", "refuse", "hang", "error", "reset")


class FaultyProxy:
    """Listens on loopback. `mode` may be changed at any time and holds for new connections; old ones are cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target, self._mode = target, "pass"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode in MODES
        self._mode = mode
        for connection in list(self._open):
            self._close(connection)

    def close(self) -> None:
        self._listener.close()
        self.mode = "refuse"

    def _close(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(client)
            threading.Thread(target=self._serve, args=(client, self._mode), daemon=True).start()

    def _serve(self, client: socket.socket, mode: str) -> None:
        with contextlib.suppress(OSError):
            if mode == "refuse":
                self._close(client)
            elif mode == "error":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self._close(client)
            elif mode in ("pass", "reset"):
                server = socket.create_connection(self._target)
                self._open.add(server)
                threading.Thread(target=self._copy, args=(server, client, None), daemon=True).start()
                self._copy(client, server, random.randrange(100, 20_000) if mode == "reset" else None)
            # "hang": the connection is taken, and nothing ever comes back

    def _copy(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        """Until one side ends, or `most` bytes have passed."""
        with contextlib.suppress(OSError):
            passed = 0
            while (content := source.recv(65536)) and (most is None or passed < most):
                target.sendall(content)
                passed += len(content)
        self._close(source)
        self._close(target)
