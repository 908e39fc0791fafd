"""One self-contained HTML page that shows what calibration measured, and what it chose.

    page = render(open_artifact("my-artifact"))

`gathering.py` turns an artifact's plan and `report.json` into sections, each a table and the data of its chart;
`charts.py` draws them with Vega-Lite; `page.py` puts everything, the charting library included, into `page.html`.
`peers.json` is the benchmark's own result file.
"""
