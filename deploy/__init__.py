"""The command line, reports and benchmarks; joins plain objects into runs."""
