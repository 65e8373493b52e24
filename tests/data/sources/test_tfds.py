from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distiljax.data.sources import ReadOptions, open_source

BUILD = """
    import io, numpy, sys
    import tensorflow_datasets as tfds

    class SmallSet(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="one"), tfds.core.BuilderConfig(name="two")]

        def _info(self):
            features = {"text": tfds.features.Text(), "label": numpy.int64, "image": tfds.features.Image()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(200), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for number in range(count):
                text = f"Text {number} é 中." if number else b"caf\\xe9"
                image = io.BytesIO(b"none")  # it would be noticed if it were decoded
                yield number, {"text": text, "label": number, "image": image}

    for config in ("one", "two"):
        SmallSet(config=config, data_dir=sys.argv[1]).download_and_prepare(file_format="array_record")
"""

READ = """
    import sys, warnings
    warnings.simplefilter("error")
    from distiljax.data.sources import documents
    said = []
    found = [document.text for document in documents(sys.argv[1], "train", bad=said.append)]
    print(len(found), len(set(found)), len(said), "tensorflow" in sys.modules)
"""


def python(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data set of two configs, prepared by another process."""
    path = tmp_path_factory.mktemp("tfds")
    done = python(BUILD, str(path))
    assert done.returncode == 0, done.stderr
    return path


def test_tensorflow_is_not_imported(data_dir, tmp_path):
    # One that would be found, and tells.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        "__version__ = '2.20.0'\nraise SystemExit('imported')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    done = python(READ, "tfds:small_set/two:1.0.0", TFDS_DATA_DIR=str(data_dir), PYTHONPATH=path)
    assert (done.stdout, done.returncode) == ("199 199 1 False\n", 0), done.stderr


@pytest.mark.parametrize("name", ["small_set", "small_set/one", "small_set:1.0.0", "small_set/two:1.0.0"])
def test_splits_and_rows(data_dir, texts, name):
    location = f"tfds:{name}?data_dir={data_dir}"
    source = open_source(location)
    assert source.splits() == ("test", "train")
    assert not source.expensive
    pieces = source.pieces("train", source.size("train") // 6)
    assert [(piece.part, piece.parts) for piece in pieces] == [
        (part, len(pieces)) for part in range(len(pieces))
    ]
    said = []
    found = [[*source.read("train", piece, ReadOptions(), said.append)] for piece in pieces]
    assert len(pieces) in (6, 7) and sum(map(len, found)) == 199
    assert {document.text for part in found for document in part} == {
        f"Text {n} é 中." for n in range(1, 200)
    }
    assert (
        len(said) == 1
        and said[0].startswith(f"tfds:{name} record ")
        and "is not UTF-8 (byte 0xe9)" in said[0]
    )
    said = []
    assert sorted(texts(location, "test", bad=said.append)) == ["Text 1 é 中.", "Text 2 é 中."]


def test_what_is_not_there_is_refused(data_dir, refused, capfd):
    where = f"?data_dir={data_dir}"
    assert refused("tfds:").startswith("data source tfds: names no data set")
    assert "Dataset no_such_set not found" in refused(f"tfds:no_such_set{where}")
    assert "cannot be opened" in refused(f"tfds:small_set/three{where}")
    assert "cannot be opened" in refused(f"tfds:small_set:7.0.0{where}")
    assert "cannot be opened" in refused(f"tfds:no such{where}")
    assert refused(f"tfds:small_set{where}", "dev") == "tfds:small_set has no split 'dev'; it has test, train"
    assert refused(f"tfds:small_set{where}&field=body", "test") == (
        "tfds:small_set has no field 'body'; it has image, label, text: set data.text_field or ?field="
    )
    assert "record 1: the text is of type int" in refused(f"tfds:small_set{where}&field=label", "test")
    assert capfd.readouterr().out == ""


def test_files_of_another_format_are_refused(data_dir, tmp_path, refused):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "small_set" / "one" / "1.0.0"
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    assert refused(f"tfds:small_set/one?data_dir={tmp_path}") == (
        f"data source tfds:small_set/one is prepared as tfrecord in {path}; expected array_record: "
        "set another ?data_dir=, or remove that directory to have it prepared again"
    )


def test_a_set_that_cannot_be_prepared_is_refused(tmp_path, refused, capfd):
    """A registered set whose files have to be fetched by hand."""
    path = tmp_path / "data"
    said = refused(f"tfds:imagenet2012?data_dir={path}")
    assert f"data source tfds:imagenet2012 cannot be prepared in {path}/imagenet2012" in said
    assert "tfds build imagenet2012 --file_format=array_record" in said
    out, err = capfd.readouterr()
    assert out == "" and "tfds:imagenet2012: downloading and preparing in" in err
