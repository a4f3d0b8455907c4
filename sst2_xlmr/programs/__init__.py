"""The commands besides training; each module has main(argv), except for `options` and `study_runs`."""
