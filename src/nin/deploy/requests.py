"""The content of a request for a prediction: its parameters, and the image in a form. Imports no torch."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request


class RefusedError(HTTPException):
    """A request that is not answered with a prediction, with the status of its answer."""


def overloaded() -> RefusedError:
    """The refusal of a request while others use all that the limits allow."""
    return RefusedError(503, "the server is overloaded", {"retry-after": "1", "connection": "close"})


@dataclass(frozen=True)
class Parameters:
    """The query parameters of a prediction, as in ``/predict?maps=true&invert=true&top=3``.

    Attributes:
        maps: whether the answer has the score maps.
        invert: whether the image is dark on light, the reverse of the training images.
        top: the number of classes in the answer; None: all.
    """

    maps: bool = False
    invert: bool = False
    top: int | None = None


def read_parameters(request: Request) -> Parameters:
    """The parameters in a request's address; raises RefusedError on another name or value, or a name given twice."""
    values: dict[str, bool | int] = {}
    for name, value in request.query_params.multi_items():
        if name in values:
            raise RefusedError(400, f"{name}: is given twice")
        if name in ("maps", "invert"):
            if value.lower() not in ("true", "false", "1", "0"):
                raise RefusedError(400, f"{name}={value[:20]}: must be true or false")
            values[name] = value.lower() in ("true", "1")
        elif name == "top":
            if not (value.isascii() and value.isdigit() and len(value) < 7 and int(value)):
                raise RefusedError(400, f"top={value[:20]}: must be a number, 1 or more")
            values[name] = int(value)
        else:
            raise RefusedError(400, f"{name[:20]}: no such parameter; there are maps, invert and top")
    return Parameters(**values)  # type: ignore[arg-type]


async def read_file(request: Request, body: bytes) -> bytes:
    """The file in a form; raises RefusedError if there is not exactly one, or if a field is a parameter's."""

    async def parts() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, parts(), max_files=10, max_fields=100)
    parser.spool_max_size = len(body)  # the file stays in memory: a container may have no temporary folder
    try:
        form = await parser.parse()
    # A malformed form raises MultiPartException, one without a boundary KeyError, some of its charsets ValueError.
    except (MultiPartException, KeyError, ValueError):
        raise RefusedError(400, "the form is malformed") from None
    try:
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        if len(files) != 1:
            raise RefusedError(400, f"the form has {len(files) or 'no'} file{'s' * (len(files) > 1)}: send one image")
        for name, value in form.multi_items():
            if isinstance(value, str) and name in {field.name for field in fields(Parameters)}:  # would be ignored
                raise RefusedError(400, f"{name}: is a field of the form; give it in the address: /predict?{name}=…")
        return await files[0].read()
    finally:
        await form.close()
