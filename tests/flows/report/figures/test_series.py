from flows.report.figures.series import draw


def test_figures_hold_every_point():
    svg = draw({"a <b>": [(0.0, 0.5, 0.1), (1.0, 0.7, 0.1)], "c": [(0.5, 0.6, float("nan"))]}, ("x", "y"), lines=True)
    assert svg.count('r="3.5"') == 3
    assert "a &lt;b&gt;" in svg
    assert "nan" not in svg
