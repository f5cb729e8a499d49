"""The contract of a storage engine as tests: `pip install 'resumed[server,testing]'`.

An engine keeps the contract if a subclass of `contract.EngineContract` passes whose fixture `engine` yields the engine,
and `state_machine.check_histories` does not raise. docs/engines.md has an example. Call
`pytest.register_assert_rewrite("resumed_server.storage.testing")` in `conftest.py`, so that failed assertions show the
values that they compared.
"""
