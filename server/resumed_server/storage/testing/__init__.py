"""The contract of a storage engine as tests: `pip install 'resumed[server,testing]'`.

An engine passes when a subclass of EngineContract, whose fixture `engine` yields it, passes, and so does
`check_against_dictionary`. Call `pytest.register_assert_rewrite("resumed_server.storage.testing")` in `conftest.py`
to see what a failed assertion compared.
"""
