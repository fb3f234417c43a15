"""What the property tests share: how they search, what they count, and when an error is our own.

A case is a set of arguments, each of them good or bad. One with good arguments alone must be accepted, and the result
is checked against an oracle; one with a bad argument must be refused by an error that names it. The search is the same
each time. With `PROPERTY_FACTOR=50` it has 50 times as many cases, and with `PROPERTY_REPORT` each test appends its
counts to that file; `benchmarks/properties.py` does both.
"""

import functools
import inspect
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
OWN_FOLDERS = (ROOT / "src" / "mnist_ddpm", ROOT / "examples")
FACTOR = int(os.environ.get("PROPERTY_FACTOR", "1"))
REPORT = os.environ.get("PROPERTY_REPORT")
SECONDS_PER_CASE = 120  # far beyond what the slowest case takes: a case that gets there hangs
SPARE_MEMORY = 2**31  # bytes of address space that a case may take

# values that are no number, or a number that is out of every range
NO_NUMBERS = [None, "1", "", b"1", [], [0.5], {}, 1j, object(), math.nan]
ABSURD = [math.inf, -math.inf, -1, 10**12, 10**400]


def searched(cases, least_accepted=1 / 3, examples=(), **strategies):
    """Make a property test of a function: it is called with drawn arguments, in so many cases.

    The function returns None for a case that was accepted and checked, and what an error named for one that was
    refused. The test fails if fewer than `least_accepted` of the cases were accepted. `examples` are cases that are
    always tried: the faults that were found.
    """

    def decorate(function):
        @functools.wraps(function)
        def test(**fixtures):
            refused, seconds = [], time.perf_counter()

            @settings(
                max_examples=cases * FACTOR,
                derandomize=FACTOR == 1,
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],  # the cases are small as they are drawn
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            )
            @given(**strategies)
            def search(**case):
                with bounded():
                    refused.append(function(**fixtures, **case))

            for case in examples:
                search = example(**case)(search)
            failure = None
            try:
                search()
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"
                raise
            finally:
                accepted = refused.count(None)
                if REPORT:
                    test_id = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]
                    row = {"test": test_id, "cases": len(refused), "accepted": accepted, "failure": failure}
                    row |= {"refused": Counter(name for name in refused if name)}
                    row |= {"seconds": round(time.perf_counter() - seconds, 1)}
                    with open(REPORT, "a") as report:
                        report.write(json.dumps(row) + "\n")
            assert accepted >= least_accepted * len(refused), f"{accepted} of {len(refused)} cases were accepted"

        # pytest asks for what is not drawn: fixtures and parameters
        signature = inspect.signature(function)
        others = [parameter for name, parameter in signature.parameters.items() if name not in strategies]
        test.__signature__ = signature.replace(parameters=others)
        return test

    return decorate


@contextmanager
def bounded():
    """Fail what takes too long, or more memory than any case should; on Linux, which tells what is used."""
    if sys.platform != "linux":
        yield
        return

    def hang(number, frame):
        raise AssertionError(f"the case did not end within {SECONDS_PER_CASE} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS_PER_CASE)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def attempt(call, wrong):
    """The result of a call and None; or None and which of the wrong arguments its error names.

    The error must be our own: raised in our files, of a kind that callers expect, and naming a wrong argument.
    """
    try:
        result = call()
    except (ValueError, TypeError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        named = [name for name in sorted(wrong) if name in str(error)]
        if not named or raised_in.parent not in OWN_FOLDERS:
            raise AssertionError(f"{wrong or 'nothing'} was wrong, but {raised_in} said: {error}") from error
        return None, named[0]
    assert not wrong, f"{wrong} should have been refused"
    return result, None


def half(strategy):
    """None in half of the cases."""
    return st.booleans().flatmap(lambda some: strategy if some else st.none())


@st.composite
def arguments(draw, good, bad, required=()):
    """Arguments by name, and which of them are wrong: in half of the cases none, else one or two.

    Args:
        good: for each argument a strategy of values that are accepted.
        bad: for some of them a list or a strategy of values that are not.
        required: arguments that are always there; the others now and then.
    """
    values = {name: draw(values) for name, values in good.items() if name in required or draw(st.booleans())}
    some = st.lists(st.sampled_from(sorted(bad)), min_size=1, max_size=2, unique=True) if bad else st.nothing()
    wrong = draw(st.just([]) | some)
    for name in wrong:
        values[name] = draw(bad[name] if isinstance(bad[name], st.SearchStrategy) else st.sampled_from(bad[name]))
    return values, frozenset(wrong)
