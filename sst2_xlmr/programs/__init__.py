"""The commands besides training; each module has main(argv)."""
