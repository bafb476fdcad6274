"""What the program of every kind of stage does: it takes its job from standard input, where its
keeper has put it, joins the driver, and replays microbatches until its keeper ends it."""

import gc
import sys
import traceback
from collections.abc import Callable

import msgspec

from pipeserve.errors import PipeserveError
from pipeserve.stage.compute import Compute, Tell
from pipeserve.stage.last_spans import LastSpans
from pipeserve.stage.loop import StageLoop
from pipeserve.stage.memory import resident_bytes
from pipeserve.wire import connecting, control
from pipeserve.wire.sources import Sources
from pipeserve.wire.stage_job import StartStage, decode_launch

_LAST_WORD_S = 2.0


def serve(make: Callable[[StartStage, Tell], Compute]) -> None:
    """Run the stage that standard input says; on failure, tell the driver and exit 1."""
    gc.freeze()  # what is imported stays: no collection is to walk through it
    gc.enable()
    baseline = resident_bytes()
    launch = decode_launch(sys.stdin.buffer.read())
    job, rank, epoch, secret, spans = msgspec.structs.astuple(launch)
    sources = Sources(secret)
    try:
        driver = connecting.connected(job.control, sources, "stage")
    except ConnectionError as error:
        sys.exit(f"error: stage {job.stage}: the driver at {error}")
    driver.send(control.encode(control.StageHello(rank), epoch))
    try:
        stage = StageLoop(job, epoch, sources, driver, make, baseline, LastSpans(spans).put)
        stage.wait_for_memory()
        gc.collect()
        gc.freeze()
        stage.run()
    except Exception as error:
        if job.traceback:
            traceback.print_exc()
        failed = control.StageFailed(_reason(error), isinstance(error, PipeserveError))
        driver.send(control.encode(failed, epoch))
        driver.close(wait_s=_LAST_WORD_S)
        sys.exit(1)


def _reason(error: Exception) -> str:
    """One line for the user: what happened and, where it is known, the remedy."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, PipeserveError):
        return text
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory ({text}); use more stages or a smaller --kv-cache-memory-bytes"
    return f"{type(error).__name__}: {text} (PIPESERVE_TRACEBACK=1 prints where)"
