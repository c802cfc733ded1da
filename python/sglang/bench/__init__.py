"""The load generator behind `python -m sglang.bench_serving`: it speaks only HTTP.

options.py, cli.py, unsupported.py   what was asked for
datasets/                            conversations to hold, one file a data set
arrivals.py                          when each conversation begins
clients/                             one file a wire format
runner.py                            holds the conversations, keeps the records
metrics.py, goodput.py               pure functions of the records
report.py, result_file.py            the table and the JSON line
session.py                           the whole run, top to bottom
"""
