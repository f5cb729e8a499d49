"""Failed assertions in the shared suites show the compared values, as in test modules."""

import pytest

pytest.register_assert_rewrite("resumed_server.storage.testing")
