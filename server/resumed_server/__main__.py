"""`python -m resumed_server` is the command `resumed`."""

from resumed_server.cli import main

if __name__ == "__main__":
    main()
