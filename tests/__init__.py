"""The tests; failed assertions of `tests.support` show their values as those of the tests do."""

import sys

if "pytest" in sys.modules:  # not in a child process
    sys.modules["pytest"].register_assert_rewrite("tests.support")
