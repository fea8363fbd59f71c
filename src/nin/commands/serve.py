"""``nin serve RUN_OR_EXPORT``: a trained network as an HTTP service, with a page to try it."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nin.commands.options import add_allow_option
from nin.config.schema import UserError
from nin.runs.console import format_path

# The variable that holds the key which clients must send.
KEY = "NIN_API_KEY"


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    key = os.environ.get(KEY)
    if key is not None and not (key := key.strip()):  # a key from a file ends in a line break, which no client can send
        raise UserError(f"{KEY} is empty: set it to a key, or remove it to serve without one")
    try:
        from nin.deploy import server
        from nin.deploy.service import Limits, Service
    except ImportError as error:
        packages = "'uvicorn[standard]' starlette python-multipart prometheus-client onnxruntime"
        raise UserError(f"needs {error.name}: python3 -m pip install {packages}") from None
    from nin.data.parallel import count_cores
    from nin.deploy.onnx_model import load_onnx

    listener = server.listen(args.host, args.port)
    with listener:
        export = find_export(args.network, args.allow)
        limits = Limits(
            body_bytes=int(args.max_megabytes * 1e6),
            pixels=int(args.max_megapixels * 1e6),
            waiting_images=args.max_waiting,
            seconds=args.timeout,
        )
        service = Service(load_onnx(export, args.threads or count_cores()), limits, key)
        address = f"[{args.host}]" if ":" in args.host else args.host
        print(f"{format_path(export)} at http://{address}:{listener.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        return server.run(service, listener)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nin serve",
        allow_abbrev=False,
        description="Serve an export with onnxruntime: POST an image to /predict, or open the page at /. A run "
        f"without an export of its best.ckpt is exported first. Where the variable {KEY} is set, clients must send its "
        "value.",
        epilog="example: nin serve outputs/runs/first --port 8000",
    )
    parser.add_argument("network", metavar="RUN_OR_EXPORT", type=Path, help="a run's folder, or an exported .onnx file")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all that this process may use")
    parser.add_argument("--max-megabytes", type=float, default=20, help="largest request body; default: 20")
    parser.add_argument("--max-megapixels", type=float, default=25, help="largest image; default: 25")
    parser.add_argument("--max-waiting", type=int, default=256, help="images that may wait to be scored; default: 256")
    parser.add_argument(
        "--timeout", type=float, default=30, help="seconds for an upload and for an answer; default: 30"
    )
    add_allow_option(parser)
    args = parser.parse_args(arguments)
    for name in ("threads", "max_megabytes", "max_megapixels", "max_waiting", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    return args


def find_export(path: Path, allowed: Sequence[str] = ()) -> Path:
    """The export that ``path`` is, or that a run's folder has; one that is missing or of another best.ckpt is made.

    Args:
        allowed: modules whose classes the checkpoint may name.

    Raises:
        UserError: if there is no such file or run, or it is not to be exported.
        SystemExit: with the exit status of an export that failed.
    """
    from nin.checkpoints.checksum import read_checksum
    from nin.deploy.loading import default_export, find_checkpoint, is_export
    from nin.deploy.onnx_model import load_onnx

    if is_export(path):
        return path
    checkpoint = find_checkpoint(path, "an exported .onnx file")
    if path.is_file():
        raise UserError(
            f"{path}: not an exported .onnx file; give one, or a run's folder; a checkpoint is exported with: nin "
            f"export {path}"
        )
    export = default_export(path, ".onnx")
    # Checksums are compared, not times of modification: copying a folder changes these, and best.ckpt may have been
    # replaced during an export.
    try:
        known = load_onnx(export).description.more.get("checkpoint_sha256")
    except UserError:  # there is none, or it is damaged
        known = None
    if known is None or known != read_checksum(checkpoint):
        print(f"exporting {format_path(path)} …", flush=True)
        # The export runs in a process of its own, so that the server does not hold the memory of torch.
        command = ["nin", "export", str(path), *(f"--allow={module}" for module in allowed)]
        status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if status == 2:
            raise UserError(f"{path}: could not be exported")
        if status:  # the export failed, which is no mistake of the command, or a signal ended it
            print(f"nin serve: {format_path(path)}: could not be exported", file=sys.stderr)
            sys.exit(status if status > 0 else 128 - status)
    return export
