"""A pipeline that goes on under another engine: stages take seconds to start, an engine nothing."""

from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.records import Recorder, ignore
from pipeserve.driver.driver import Driver


def go_on_under(driver: Driver, engine: Engine, record: Recorder = ignore) -> None:
    """Nothing may be unfinished; stages know requests by ids, so no id may come twice."""
    assert not driver.engine.has_work
    driver.engine = engine
    driver.journal = Journal(engine, record)
