"""What a maintainer runs on the source itself; not in the wheel, and nothing imports it but the tests."""
