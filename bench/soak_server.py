"""The strangers' web server of bench/soak.py: slow, lying, endless and honest answers.

A process of its own, so that its threads, descriptors and memory are not counted as the engine's.
It listens on 127.0.0.1, which the soak allows, and at the same port on 127.0.0.2, which it does
not. Prints its port; when stdin ends, prints how many connections came to 127.0.0.2 and exits.

    python bench/soak_server.py DIRECTORY      (serves the files in it, under /file/NAME)
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

ALLOWED, FORBIDDEN = "127.0.0.1", "127.0.0.2"
SLOW_S = 0.4  # that a slow but honest answer takes


class Server:
    """All answers by path; see `_answer`."""

    def __init__(self, directory: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.forbidden = 0
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()

    async def run(self) -> None:
        """Serve until stdin ends."""
        allowed = await asyncio.start_server(self._serve, ALLOWED, 0, backlog=256)
        self.port = allowed.sockets[0].getsockname()[1]
        await asyncio.start_server(self._refuse, FORBIDDEN, self.port)
        print(self.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print(self.forbidden, flush=True)

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.forbidden += 1
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if not await self._answer(head.split(b" ", 2)[1].decode("latin-1"), writer):
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client left
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        _, first, *rest = path.split("/")
        body = self.files.get(rest[0], b"") if rest else b""

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        def head(status: int, length: int, *more: str) -> bytes:
            lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {length}", *more]
            return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

        if first == "file":
            await send(head(200, len(body)) + body)
        elif first == "alone":  # every connection that is kept open ends with this answer
            for other in self._open - {writer}:
                other.close()
            await send(head(200, len(body), "Connection: close") + body)
            return False
        elif first == "slow":
            await send(head(200, len(body)))
            for index in range(10):
                await asyncio.sleep(SLOW_S / 10)
                await send(body[index * len(body) // 10 : (index + 1) * len(body) // 10])
        elif first == "stall":  # a byte now and then: no read times out, the fetch must
            await send(head(200, len(body)))
            for byte in body:
                await send(bytes([byte]))
                await asyncio.sleep(0.1)
        elif first == "endless":
            await send(b"HTTP/1.1 200 OK\r\n\r\n" + body)
            while True:
                await send(bytes(1 << 14))
        elif first == "short":  # less than it promises
            await send(head(200, 2 * len(body)) + body)
            return False
        elif first == "announce":  # more than any limit
            await send(head(200, 1 << 40) + body)
            return False
        elif first == "gzip":
            await send(head(200, len(body), "Content-Encoding: gzip") + body)
        elif first == "status":
            await send(head(int(rest[0]), 0))
        elif first == "html":
            page = b"<html>not a picture</html>"
            await send(head(200, len(page), "Content-Type: image/png") + page)
        elif first == "loop":
            await send(head(302, 0, "Location: /loop"))
        elif first == "to-file":
            await send(head(302, 0, f"Location: /file/{rest[0]}"))
        elif first == "to-private":
            await send(head(302, 0, f"Location: http://{FORBIDDEN}:{self.port}/"))
        elif first == "to-scheme":
            await send(head(302, 0, "Location: file:///etc/passwd"))
        else:
            await send(head(404, 0))
        return True


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Server(Path(sys.argv[1])).run())
