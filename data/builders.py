"""The data sets that DATA.DATASET names, each with the builder that answers for it."""

from yacs.config import CfgNode

from data.sources.base import DatasetBuilder
from data.sources.bundled import Digits, FashionMnist
from data.sources.image_files import ImageFiles
from data.sources.tokens import LongRangeArena

BUILDERS: tuple[DatasetBuilder, ...] = (ImageFiles(), Digits(), FashionMnist(), LongRangeArena())
DATASETS = {builder.name: builder for builder in BUILDERS}


def builder_of(config: CfgNode) -> DatasetBuilder:
    """The builder of the data set that a configuration names."""
    return DATASETS[config.DATA.DATASET]
