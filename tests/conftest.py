import pytest
import torch
from helpers import embedded_pipeline, make_dit, make_pixart, save_dit

torch.set_num_threads(1)


@pytest.fixture
def pipe():
    return embedded_pipeline()


@pytest.fixture
def dit():
    return make_dit()


@pytest.fixture
def pixart():
    return make_pixart()


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory):
    """A tiny DiTPipeline as ``save_pretrained`` leaves it."""
    return save_dit(tmp_path_factory.mktemp("dit"), num_layers=4)


@pytest.fixture(scope="session")
def pixart_folder(tmp_path_factory):
    """A tiny PixArtAlphaPipeline as ``save_pretrained`` leaves it."""
    folder = tmp_path_factory.mktemp("pixart")
    make_pixart().save_pretrained(folder)
    return folder
