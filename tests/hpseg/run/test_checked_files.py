"""Files of tensors that hold their own checksum."""

import pytest
import torch

from hpseg.run.files import Damaged, checksum, read_checked, save_checked


@pytest.fixture
def written(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2]), "none": torch.zeros(0, 4)}
    path, metadata = tmp_path / "x.safetensors", {"recipe": "of these"}
    path.write_bytes(save_checked(tensors, metadata))
    return path, tensors, metadata


def test_what_was_written_is_read(written):
    path, tensors, metadata = written
    found, said = read_checked(path)
    assert said == metadata and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert checksum(found, said) == checksum(tensors, metadata)


@pytest.mark.parametrize("place", [-1, -24])  # the last byte of tensor "b", the first of it
def test_one_changed_byte_shows(written, place):
    content = bytearray(written[0].read_bytes())
    content[place] ^= 1
    written[0].write_bytes(content)
    with pytest.raises(Damaged, match=r"^its checksum is wrong$"):
        read_checked(written[0])


def test_changed_metadata_shows(written):
    path, _, _ = written
    path.write_bytes(path.read_bytes().replace(b"of these", b"of those"))
    with pytest.raises(Damaged, match="checksum"):
        read_checked(path)


def test_a_file_without_a_checksum_is_damaged(written):
    from safetensors.torch import save

    written[0].write_bytes(save(written[1], written[2]))
    with pytest.raises(Damaged, match="checksum"):
        read_checked(written[0])


def test_part_of_a_file_another_file_and_none_are_damaged(written):
    path = written[0]
    whole = path.read_bytes()
    for content in (whole[:-8], whole[:20], b"", b"no tensors"):
        path.write_bytes(content)
        with pytest.raises(Damaged):
            read_checked(path)
    path.unlink()
    with pytest.raises(Damaged):
        read_checked(path)
