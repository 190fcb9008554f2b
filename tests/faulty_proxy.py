"""A TCP proxy in front of a server that imitates faults of networks and servers."""

import contextlib
import random
import socket
import threading

MODES = ("pass", "refuse", "hang", "error", "reset")


class FaultyProxy:
    """Listens on loopback and passes connections on to `target`, an address and port, as `mode` says.

    Modes: "pass" forwards all bytes, "refuse" closes at once, "hang" accepts and never answers, "error" answers 500,
    "reset" closes after a random number of bytes. A new mode closes the open connections and holds for later ones.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target, self._mode = target, "pass"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> str:
        """How new connections are treated."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode in MODES
        self._mode = mode
        for connection in list(self._open):
            self._close(connection)

    def close(self) -> None:
        """Stop listening and close all connections."""
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
            # "hang": the connection stays open without an answer

    def _copy(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        """Copy until one side closes, or until at least `limit` bytes have passed; then close both."""
        with contextlib.suppress(OSError):
            copied = 0
            while (content := source.recv(65536)) and (limit is None or copied < limit):
                target.sendall(content)
                copied += len(content)
        self._close(source)
        self._close(target)
