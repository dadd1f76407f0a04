"""The command `pipermoe`: its commands in the order of the loop, and how every failure ends.

Results go to stdout, progress to stderr. Exit codes: 0 done, 2 wrong input, 3 no plan fits, 4 the machine failed,
130 interrupted. Commands import what they need when they run, so that `--help` is quick and planning never loads torch.
"""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError

from pipermoe import __version__
from pipermoe.cli.balance import balance
from pipermoe.cli.compare import compare
from pipermoe.cli.demo import demo
from pipermoe.cli.describe import describe
from pipermoe.cli.dryrun import dryrun
from pipermoe.cli.export import export
from pipermoe.cli.import_plan import import_plan
from pipermoe.cli.measure import measure
from pipermoe.cli.megatron_memory import megatron_memory
from pipermoe.cli.plan import plan
from pipermoe.cli.predict import predict
from pipermoe.cli.schedule import schedule
from pipermoe.cli.sweep import compare_platforms, sweep
from pipermoe.cli.tokenize import tokenize
from pipermoe.cli.train import train
from pipermoe.cli.validate import validate
from pipermoe.specs.errors import UserError

COMMANDS = (
    measure,
    describe,
    plan,
    predict,
    sweep,
    compare_platforms,
    dryrun,
    tokenize,
    train,
    compare,
    export,
    import_plan,
    megatron_memory,
    schedule,
    balance,
    validate,
    demo,
)


def build_app() -> App:
    """The parser of the whole command line."""
    app = App(
        name="pipermoe",
        version=__version__,
        help="Find, predict and run the best way to train a Mixture-of-Experts language model.",
        help_on_error=False,
        suppress_keyboard_interrupt=False,  # which would end without a word
    )
    for position, command in enumerate(COMMANDS):
        app.command(command, sort_key=position)
    return app


def run(arguments: list[str]) -> int:
    """Run the command line; every expected failure is one line on stderr and an exit code."""
    try:
        build_app()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except CycloptsError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _fail("this command needs torch: pip install 'pipermoe[train]'", 2)
    except BrokenPipeError:
        sys.stderr.close()
    return 0


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"pipermoe: {line}", file=sys.stderr)
    return code
