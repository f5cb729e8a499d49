"""Failed assertions in the shared suites show what was compared, as those in test modules do."""

import pytest

pytest.register_assert_rewrite("resumed_server.storage.testing")
