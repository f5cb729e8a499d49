"""Generated stubs of `resumed.v1`: run `make stubs` after a change of the contract."""
