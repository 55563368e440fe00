"""The study as a web page. Owns starlette and uvicorn, which come with `pip install 'ziplora[study]'`.

No cookies, no accounts, no addresses kept. Nothing that is sent tells which method made which picture: pictures are
asked for by participant, question and side, and are encoded anew, without what their files say.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.errors import NotFound, ServiceError
from service.storage import Store
from service.study import PARTICIPANT, Asked, Study, answer, answered, asked_of, begin, has_begun
from service.thumbnails import thumbnail

SIDE = 1024  # pixels of a picture as it is shown
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 4096
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(store: Store, study: Study, references: Mapping[tuple[str, str], bytes], host: str) -> Starlette:
    """`references`: WebP pictures by (role, id), of every subject and style that is asked about."""
    known: set[str] = set()  # participants

    def check(participant: str) -> None:
        if not PARTICIPANT.fullmatch(participant):
            raise NotFound("no such participant")
        if participant not in known and not has_begun(store, study, participant):
            raise NotFound("no such participant")
        known.add(participant)

    def state(participant: str) -> dict[str, Any]:
        check(participant)
        done = answered(store, study, participant)
        asked = asked_of(study, participant)
        following = next((one for one in asked if one.question.id not in done), None)
        return {
            "participant": participant,
            "asked": len(asked),
            "answered": sum(one.question.id in done for one in asked),
            "question": following and following.question.id,
        }

    def find(participant: str, question: str) -> Asked:
        check(participant)
        found = next((one for one in asked_of(study, participant) if one.question.id == question), None)
        if found is None:
            raise NotFound("no such question")
        return found

    @lru_cache(512)
    def shown(key: str) -> bytes:
        return thumbnail(store.get(key), SIDE, quality=95)

    async def start(request: Request) -> Response:
        participant = await run_in_threadpool(begin, store, study)
        known.add(participant)
        return JSONResponse(await run_in_threadpool(state, participant), headers=HEADERS)

    async def see(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(state, request.path_params["participant"]), headers=HEADERS)

    async def take(request: Request) -> Response:
        participant, question = request.path_params["participant"], request.path_params["question"]
        given = await _body(request)
        if given.get("side") not in ("left", "right"):
            return JSONResponse({"error": "side is left or right"}, 400, headers=HEADERS)
        ms = given.get("ms")
        ms = int(ms) if isinstance(ms, int | float) and 0 <= ms < 1e12 else None

        def keep() -> dict[str, Any]:
            check(participant)
            new = answer(store, study, participant, question, given["side"] == "left", ms)
            return {"new": new} | state(participant)

        return JSONResponse(await run_in_threadpool(keep), headers=HEADERS)

    async def picture(request: Request) -> Response:
        participant, question, which = (request.path_params[name] for name in ("participant", "question", "which"))
        asked = await run_in_threadpool(find, participant, question)
        if which in ("subject", "style"):
            body = references[which, getattr(asked.question, which)]
        elif which in ("left", "right"):
            place = asked.left if which == "left" else 1 - asked.left
            body = await run_in_threadpool(shown, asked.question.keys[place])
        else:
            raise NotFound("no such picture")
        return Response(body, media_type="image/webp", headers=HEADERS)

    async def static(request: Request) -> Response:
        name = request.path_params.get("name", "study.html")
        if name not in ("study.html", "study.css", "study.js"):
            raise NotFound("no such page")
        body = (files("service") / "templates" / "study" / name).read_bytes()
        return Response(body, headers=HEADERS | {"Content-Type": TYPES[name.rpartition(".")[2]]})

    async def refused(request: Request, error: Exception) -> Response:
        status = 404 if isinstance(error, NotFound) else 503
        return JSONResponse({"error": "not found" if status == 404 else str(error)}, status, headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", static),
            Route("/{name}", static),
            Route("/api/begin", start, methods=["POST"]),
            Route("/api/{participant}", see),
            Route("/api/{participant}/{question}", take, methods=["POST"]),
            Route("/picture/{participant}/{question}/{which}", picture),
        ],
        exception_handlers={ServiceError: refused},
        # a name that leads here from some page on the web is not ours
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])] if host in LOOPBACK else [],
    )


def serve(app: Starlette, host: str, port: int) -> None:
    """Until interrupted."""
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, server_header=False)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent; {} for anything else."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return {}
    try:
        given = json.loads(body)
    except ValueError:
        return {}
    return given if isinstance(given, dict) else {}
