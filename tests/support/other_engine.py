"""A pipeline that goes on under another engine: stages take seconds to start, an engine nothing."""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from pipeserve import LLM
from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Recorder, ignore
from pipeserve.core.view import Limits
from pipeserve.driver.driver import Driver

_started_with: WeakKeyDictionary[Driver, Limits] = WeakKeyDictionary()


def renew(llm: LLM, policy: str = "uniform", **limits: Any) -> None:
    """Gives `llm` a fresh engine with the limits that it started with, but for these."""
    driver = llm.client
    limits = replace(_started_with.setdefault(driver, driver.limits), **limits)
    go_on_under(driver, Engine(driver.plan, get_policy(policy), limits))


def go_on_under(driver: Driver, engine: Engine, record: Recorder = ignore) -> None:
    """Nothing may be unfinished; stages know requests by ids, so no id may come twice."""
    assert not driver.engine.has_work
    driver.engine = engine
    driver.journal = Journal(engine, record)
