"""Spreads requests over servers: python load_balancer.py 8000 http://127.0.0.1:8001 http://127.0.0.1:8002."""

import sys

import httpx
import uvicorn
from starlette.requests import Request
from starlette.responses import Response

port, *servers = sys.argv[1:]
client = httpx.AsyncClient(timeout=60)


async def app(scope, receive, send) -> None:
    request, answer = Request(scope, receive), Response("No server is ready", 503)
    servers.append(servers.pop(0))
    for server in list(servers):  # those that are down or full are passed over
        url, content = f"{server}{request.url.path}?{request.url.query}", await request.body()
        try:
            found = await client.request(request.method, url, content=content)
        except httpx.TransportError:
            continue
        answer = Response(found.content, found.status_code, media_type=found.headers.get("content-type"))
        if found.status_code not in (429, 503):
            break
    await answer(scope, receive, send)


uvicorn.run(app, port=int(port), lifespan="off")
