"""The web page: static files of this package, held in memory, asking only the public API."""

import hashlib
from importlib import resources

from fastapi import FastAPI, Request, Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NAMES = {"/": "index.html", "/docs": "docs.html", "/favicon.ico": "icon.svg"}


def _paths() -> dict[str, str]:
    folder = resources.files("foretaste.serving") / "web"
    names = sorted(file.name for file in folder.iterdir() if file.name[0] not in "._")
    return _NAMES | {f"/web/{name}": name for name in names}


FILES = frozenset(_paths())
"""The paths of the page; they hold no data and so need no token."""


def add_page(app: FastAPI) -> None:
    """Serve each file at its path, with an entity tag: a browser asks, and mostly keeps its own."""
    folder = resources.files("foretaste.serving") / "web"
    for path, name in _paths().items():
        _add_file(app, path, (folder / name).read_bytes(), _TYPES["." + name.rpartition(".")[2]])


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    app.add_api_route(
        path, file, methods=["GET", "HEAD"], include_in_schema=False, response_class=Response
    )
