"""`python -m memorizing` is the same as `memorizing`."""

from memorizing.main import main

if __name__ == "__main__":
    main()
