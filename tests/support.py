"""Names of the old suite, until its tests are rewritten."""

from tests.case import *  # noqa: F403
from tests.case import (
    STEERING,
    HURRY,
    at_start,
    clean_environment,
    decoded,
    remove_tree,
    stop,
    make_writable,
)
from tests.server import *  # noqa: F403
