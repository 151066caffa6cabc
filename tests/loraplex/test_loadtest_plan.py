"""What may be typed after `loraplex bench`, and what it comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex import cli
from loraplex.loadtest.plan import Point, check_outputs, expand, spec, sweep, targets
from loraplex.loadtest.specs import Closed, Lengths, Popularity, Punica, SLora

URL = "http://127.0.0.1:1"


def test_servers_are_named_or_named_by_their_address() -> None:
    found = targets(["ours=http://h:1/", "https://h:2/v1", "http://u:p@h:3"])
    assert [(target.name, target.url) for target in found] == [
        ("ours", "http://h:1"),
        ("h:2", "https://h:2"),
        ("h:3", "http://u:p@h:3"),
    ]


def test_options_are_for_one_server_or_for_all() -> None:
    ours, other = targets(
        ["ours=http://h:1", "other=http://h:2"],
        styles=["other=llama.cpp"],
        models=["m", "other=n"],
        adapters=["a{0..1}", "other=x,y"],
        api_keys=["c2VjcmV0==", "other=k"],
    )
    assert (ours.style, ours.model, ours.adapters, ours.api_key) == (
        "openai",
        "m",
        ("a0", "a1"),
        "c2VjcmV0==",
    )
    assert (other.style, other.model, other.adapters, other.api_key) == ("llama.cpp", "n", ("x", "y"), "k")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sql", ["sql"]),
        ("a, b", ["a", "b"]),
        ("a{0..2},b", ["a0", "a1", "a2", "b"]),
        ("{08..10}", ["08", "09", "10"]),
        ("r{1..2}-{0..1}", ["r1-0", "r1-1", "r2-0", "r2-1"]),
    ],
)
def test_names_in_braces(text: str, names: list[str]) -> None:
    assert list(expand(text)) == names


def test_a_workload_takes_its_own_options_and_defaults() -> None:
    assert spec("closed", {"requests": None}) == Closed()
    assert spec("closed", {"requests": 3, "spread": "zipf"}) == Closed(
        requests=3, spread=Popularity("zipf", 1)
    )
    assert spec("s-lora", {"alpha": 0.1, "output_range": "1:9"}) == SLora(
        alpha=0.1, output_range=Lengths(1, 9)
    )
    assert spec("punica", {"mix": "zipf:2", "seed": 1}) == Punica(mix=Popularity("zipf", 2), seed=1)


def test_sweeps() -> None:
    closed, slora = Closed(), SLora(alpha=0.5)
    assert sweep(closed, 4, None, None).points == (Point(closed, 4),)
    counts = sweep(closed, 4, "4,0,1", None)
    assert [(point.adapters, counts.label(point)) for point in counts.points] == [
        (0, "adapters 0"),
        (1, "adapters 1"),
        (4, "adapters 4"),
    ]
    rates = sweep(slora, 4, None, "2,0.5")
    assert [point.spec for point in rates.points] == [SLora(alpha=0.5, rate=0.5), SLora(alpha=0.5, rate=2)]
    assert [rates.value(point) for point in rates.points] == [0.5, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Missing argument '[NAME=]URL'."),
        ("host:1", "host:1 is no server; write NAME=URL or URL, such as http://127.0.0.1:8080"),
        (f"{URL} {URL}", "two servers are called 127.0.0.1:1; give each a name of its own: NAME=URL"),
        (f"{URL} --workload open", "--workload open: write closed, s-lora, punica"),
        (f"{URL} --rate 3", "--rate goes with --workload s-lora, not with closed"),
        (f"{URL} --workload s-lora --requests 3", "goes with --workload closed or punica, not with s-lora"),
        (f"{URL} --requests 0", "--requests must be at least 1"),
        (f"{URL} --requests x", "Invalid value for '--requests'"),
        (f"{URL} --seed -1", "--seed must be at least 0"),
        (f"{URL} --spread zipf:x", "--spread zipf:x: 'x' is not a number"),
        (
            f"{URL} --spread uniform:2",
            "--spread uniform:2: write one of uniform, round-robin, zipf:1, power:0.3",
        ),
        (f"{URL} --workload punica --mix zipf:0.5", "--mix zipf:0.5: groups grow by a factor above 1"),
        (f"{URL} --workload punica --max-length 2", "--max-length must be at least 3"),
        (f"{URL} --workload s-lora --cv 0", "--cv must be a number above 0"),
        (f"{URL} --workload s-lora --rate 0.1 --duration 1", "must give at least one request"),
        (
            f"{URL} --workload s-lora --input-range 9",
            "--input-range 9 is no range; write LOW:HIGH, such as 8:512",
        ),
        (f"{URL} --workload s-lora --input-range 9:9", "--input-range 9:9 holds no length"),
        (f"{URL} --rates 1,2", "--rates goes with --workload s-lora"),
        (f"{URL} --workload s-lora --rates 0", "--rates 0: '0' is not above 0"),
        (
            f"{URL} --workload s-lora --rates 1 --adapter-counts 0",
            "give --adapter-counts or --rates, not both",
        ),
        (f"{URL} --adapters a --adapter-counts 1,2", "--adapter-counts 1,2: --adapters names only 1"),
        (f"{URL} --adapter-counts x", "--adapter-counts x: write whole numbers with commas, such as 1,8,32"),
        (f"{URL} --adapters a,a", "--adapters a,a: a name is there twice"),
        (f"{URL} --adapters a,", "--adapters a,: a name is empty"),
        (f"{URL} --adapters a{{3..1}}", "{3..1} is no range; write the smaller number first"),
        (f"{URL} --adapters a{{0..999999}}", "{0..999999} is no range"),
        (f"a={URL} b={URL} --adapters a=x", "all servers need equally many adapters (a 1, b 0)"),
        (f"a={URL} --model b=x", "--model b=x: no server is called b; there is a"),
        (f"{URL} --style odd", "--style odd: write openai or llama.cpp"),
        (f"{URL} --base-share 2", "--base-share must lie between 0 and 1"),
        (f"{URL} --rounds 0", "--rounds must lie between 1 and 1000"),
        (f"{URL} --vocabulary 10", "--vocabulary must be above 10"),
        (f"{URL} --timeout 0", "--timeout must be a number above 0"),
        (f"{URL} --silence-timeout inf", "--silence-timeout must be a number above 0"),
        (f"{URL} --slo 0", "--slo must be above 0"),
        (f"{URL} --json /nowhere/file", "--json /nowhere/file: no such folder to write a file into"),
        (f"{URL} --plots plots", "--plots draws a sweep: add --adapter-counts 1,8,32 or --rates 1,2,4"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("loraplex: ")
    assert error.count("\n") == 1
    assert message in error


def test_plots_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.loadtest.plan.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--plots needs matplotlib: pip install 'loraplex\[bench\]'"):
        check_outputs(sweep(Closed(), 1, "1", None), None, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="it is a file, not a folder"):
        check_outputs(sweep(Closed(), 1, "1", None), None, tmp_path / "file")


def test_help_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        f"closed, punica: requests. [default: {Closed.requests}]",
        "s-lora: tokens in. [default: 8:512]",
        "Most seconds of one request. [default: 600]",
        "env var: LORAPLEX_API_KEY",
    ):
        assert words in text
