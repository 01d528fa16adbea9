"""The public data sets that foretaste knows by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from foretaste.data.sources.files import Address, Files, Tables, Wheel
from foretaste.data.sources.rankings import (
    SOCIAL_FILES,
    read_amazon,
    read_ciao_ratings,
    read_gowalla,
    read_ml_1m,
    read_ml_1m_sequences,
    read_ml_100k,
    read_ml_csv,
    read_ncf,
    read_pairs,
    read_s3rec,
    read_social,
    read_tiktok,
)
from foretaste.data.sources.rows import (
    ADULT_FILES,
    CTR_FILES,
    read_adult,
    read_frappe,
    read_frappe_positives,
    read_frappe_rows,
    read_retailrocket,
    read_retailrocket_buys,
)
from foretaste.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set can be had, how it is read, and how to know that it is the one."""

    name: str
    folder: str
    """Its folder where several data sets lie side by side."""
    ways: tuple[tuple[Address | Wheel, ...], ...]
    """Tried in order; all files of one way make the data set. Empty where it is published only
    in files that are never read, such as pickles, or at no address that is known."""
    marks: tuple[str, ...]
    """Files of which a folder that holds the data set has at least one."""
    read: Callable[[Files], Tables]
    licence: str
    counts: tuple[int, int, int] | None
    """Users, items, events; None where the publisher changes them."""
    sha256: str | None = None
    """Of `Tables.sha256`; None where no whole copy could be had to take it from."""
    why_no_way: str = "it is published only in files that are not read (pickles)"


_GROUPLENS = (
    "GroupLens Research, University of Minnesota: for research only; not to be redistributed or "
    "used commercially without permission. Cite Harper and Konstan, TiiS 2015, "
    "https://doi.org/10.1145/2827872"
)
_AMAZON = (
    "Amazon review data of McAuley et al., no licence stated: for research. Cite McAuley et al., "
    "SIGIR 2015, https://arxiv.org/abs/1506.04757"
)
_YELP = "Yelp dataset terms of use: academic use only, not to be redistributed"
_HETREC = "HetRec 2011 (Last.fm), GroupLens: non-commercial use only"
_SNAP = (
    "Gowalla check-ins of SNAP, no licence stated: for research. Cite Cho et al., KDD 2011; "
    "split of He et al., SIGIR 2020"
)
_TIKTOK = (
    "TikTok micro-videos of HKUDS/DiffMM, no licence stated: for research. Cite Jiang et al., "
    "MM 2024, https://arxiv.org/abs/2406.11781"
)
_FRAPPE = (
    "Frappe: for research only, no commercial use, not to be redistributed without permission. "
    "Cite Baltrunas et al., 2015, https://arxiv.org/abs/1505.03014"
)
_RETAILROCKET = (
    "Retailrocket recommender system dataset: CC BY-NC-SA 4.0; matrices of HKUDS/SSLRec. Cite Wei "
    "et al., WSDM 2022, https://arxiv.org/abs/2202.08523"
)
_ADULT = (
    "Adult, UCI Machine Learning Repository: CC BY 4.0. Cite Becker and Kohavi, 1996, "
    "https://doi.org/10.24432/C5XW20"
)
_MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens"
_GITHUB = "https://raw.githubusercontent.com"


_SOCIAL_COMMIT = "f844a417a9ae0402ee4593ff4d21fba2f5b17cb9"
_CIAO = (
    "Ciao, trust data of Tang et al., no licence stated: for research. Cite Tang, Gao and Liu, "
    "WSDM 2012"
)


def _social(name: str, folder: str, licence: str, counts: tuple[int, int, int], sha: str) -> Source:
    base = f"{_GITHUB}/leo0481/SocialLGN/{_SOCIAL_COMMIT}/data/preprocessed/{folder}"
    return Source(
        name=name,
        folder=name,
        ways=(tuple(Address(url=f"{base}/{file}") for file in SOCIAL_FILES),),
        marks=("trust.txt",),
        read=read_social,
        licence=licence,
        counts=counts,
        sha256=sha,
    )


def _s3rec(name: str, file: str, licence: str, counts: tuple[int, int, int], sha: str) -> Source:
    base = f"{_GITHUB}/RUCAIBox/CIKM2020-S3Rec/master/data/{file}"
    return Source(
        name=name,
        folder="s3rec",
        ways=((Address(url=f"{base}.txt"), Address(url=f"{base}_item2attributes.json")),),
        marks=(f"{file}.txt",),
        read=partial(read_s3rec, name=file),
        licence=licence,
        counts=counts,
        sha256=sha,
    )


def _frappe_ctr(name: str, read: Callable[[Files], Tables], counts: tuple[int, int, int]) -> Source:
    base = f"{_GITHUB}/hexiangnan/neural_factorization_machine/master/data/frappe"
    return Source(
        name=name,
        folder="frappe/nfm-split",
        ways=(tuple(Address(url=f"{base}/{file}") for file in CTR_FILES),),
        marks=(CTR_FILES[2],),
        read=read,
        licence=_FRAPPE,
        counts=counts,
    )


_ALL = (
    Source(
        name="ml-100k",
        folder="ml-100k",
        ways=(
            (Address(url=f"{_MOVIELENS_URL}/ml-100k.zip"),),
            (Wheel(requirement="recbole==1.2.1", prefix="recbole/dataset_example/ml-100k/"),),
        ),
        marks=("u.data", "ml-100k.inter"),
        read=read_ml_100k,
        licence=_GROUPLENS,
        counts=(943, 1_682, 100_000),
        sha256="f78e39dc0cd3dd931deee29c8b18ace574c2f163ce003fd2e2faaaa94e32a47f",
    ),
    Source(
        name="ml-1m",
        folder="ml-1m",
        ways=(
            (Address(url=f"{_MOVIELENS_URL}/ml-1m.zip", md5="c4d9eecfca2ab87c1945afe126590906"),),
        ),
        marks=("ratings.dat",),
        read=read_ml_1m,
        licence=_GROUPLENS,
        counts=(6_040, 3_706, 1_000_209),
    ),
    Source(
        name="ml-1m-sequences",
        folder="ml-1m",
        ways=((Address(url=f"{_GITHUB}/kang205/SASRec/master/data/ml-1m.txt"),),),
        marks=("ml-1m.txt",),
        read=read_ml_1m_sequences,
        licence=_GROUPLENS,
        counts=(6_040, 3_416, 999_611),
        sha256="b126d5cfeaf564b6f2df8d799f36f0d69c73ddd0bc2e93fd176cc686b51684d8",
    ),
    Source(
        name="ml-1m-ncf",
        folder="ml-1m/ncf",
        ways=(
            tuple(
                Address(
                    url=f"{_GITHUB}/hexiangnan/neural_collaborative_filtering/master/Data/{file}"
                )
                for file in ("ml-1m.train.rating", "ml-1m.test.rating", "ml-1m.test.negative")
            ),
        ),
        marks=("ml-1m.test.negative",),
        read=read_ncf,
        licence=_GROUPLENS,
        counts=(6_040, 3_706, 1_598_169),
    ),
    Source(
        name="ml-20m",
        folder="ml-20m",
        ways=(
            (Address(url=f"{_MOVIELENS_URL}/ml-20m.zip", md5="cd245b17a1ae2cc31bb14903e1204af3"),),
        ),
        marks=("ratings.csv",),
        read=read_ml_csv,
        licence=_GROUPLENS,
        counts=(138_493, 26_744, 20_000_263),
    ),
    Source(
        name="ml-latest-small",
        folder="ml-latest-small",
        ways=((Address(url=f"{_MOVIELENS_URL}/ml-latest-small.zip"),),),
        marks=("ratings.csv",),
        read=read_ml_csv,
        licence=_GROUPLENS,
        counts=None,
    ),
    Source(
        name="amazon-beauty",
        folder="amazon-beauty",
        ways=(
            (
                Address(
                    url="https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
                    "reviews_Beauty_5.json.gz"
                ),
            ),
        ),
        marks=("reviews_Beauty_5.json",),
        read=partial(read_amazon, name="reviews_Beauty_5.json"),
        licence=_AMAZON,
        counts=(22_363, 12_101, 198_502),
    ),
    Source(
        name="gowalla",
        folder="gowalla",
        ways=(
            tuple(
                Address(url=f"{_GITHUB}/gusye1234/LightGCN-PyTorch/master/data/gowalla/{file}")
                for file in ("train.txt", "test.txt")
            ),
        ),
        marks=("train.txt", "train.derived.txt"),
        read=read_gowalla,
        licence=_SNAP,
        counts=(29_858, 40_981, 1_027_370),
        sha256="caa15e9e87c203e17172ef36683013767fd6dfa82ecb3a1242a02be02090cefa",
    ),
    Source(
        name="tiktok-mm",
        folder="tiktok-mm",
        ways=(),
        marks=("trnMat.derived.npz",),
        read=read_tiktok,
        licence=_TIKTOK,
        counts=(9_308, 6_710, 68_722),
        sha256="f58d78838f3206750518cbfeb4002207e7071a7af1d1061f26706c095b1916ee",
    ),
    Source(
        name="sasrec-video",
        folder="sasrec-video",
        ways=((Address(url=f"{_GITHUB}/kang205/SASRec/master/data/Video.txt"),),),
        marks=("Video.txt",),
        read=partial(read_pairs, name="Video.txt"),
        licence=_AMAZON,
        counts=(31_013, 23_715, 287_107),
        sha256="653b017d588a15f09ccfd5c59c749937e23d040489b9a019e6dee0a584f9c2c2",
    ),
    Source(
        name="bert4rec-beauty",
        folder="bert4rec-beauty",
        ways=((Address(url=f"{_GITHUB}/FeiSun/BERT4Rec/master/data/beauty.txt"),),),
        marks=("beauty.txt",),
        read=partial(read_pairs, name="beauty.txt"),
        licence=_AMAZON,
        counts=(40_226, 54_542, 353_962),
        sha256="24c3b39c03268fd97bc850b5f84ea0db1c8163c814c638980f8932c257faa6b4",
    ),
    _s3rec(
        "s3rec-beauty",
        "Beauty",
        _AMAZON,
        (22_363, 12_101, 198_502),
        "498350c29027c3448308d998984aaa589f73c63ec9837609121433b963fbd862",
    ),
    _s3rec(
        "s3rec-sports",
        "Sports_and_Outdoors",
        _AMAZON,
        (35_598, 18_357, 296_337),
        "690d784e600122bc950e0ac267cbbe7c76fc266d960de421aea8545578168a4b",
    ),
    _s3rec(
        "s3rec-yelp",
        "Yelp",
        _YELP,
        (30_431, 20_033, 316_354),
        "41d7f422136067f82f929391d60f2aac35db39d9f62c7feec4b729d03594c7aa",
    ),
    _s3rec(
        "s3rec-lastfm",
        "LastFM",
        _HETREC,
        (1_090, 3_646, 52_551),
        "11e30dded6bea923cbe5fd6a5e489e03a3a834b6f44288865a303d3016f7c622",
    ),
    _social(
        "social-lastfm",
        "lastfm",
        _HETREC,
        (1_892, 17_632, 92_834),
        "464e5db6374ea83fe708a4e39f88998a1a5f0bf6f979a805ee65b74e2c7e01e4",
    ),
    _social(
        "social-ciao",
        "ciao",
        _CIAO,
        (7_375, 105_114, 284_086),
        "0b0b2edb6e0095a5c5a6b8a9d0859b5420003a6da9cfbd33c7d8d7c14ca56af9",
    ),
    Source(
        name="ciao-ratings",
        folder="social-ciao/raw",
        ways=(),
        marks=("rating_with_timestamp.mat",),
        read=read_ciao_ratings,
        licence=_CIAO,
        counts=(7_375, 105_096, 284_052),
        sha256="d4a8c10da50c2f19601997a0b0be2b12250d9aedf484cad5fcdefc55596851e0",
        why_no_way="no address of its files is known",
    ),
    Source(
        name="frappe",
        folder="frappe",
        ways=(
            (
                Address(
                    url=f"{_GITHUB}/irecsys/CARSKit/master/context-aware_data_sets/"
                    "Mobile_Frappe.zip"
                ),
            ),
        ),
        marks=("frappe.csv",),
        read=read_frappe,
        licence=_FRAPPE,
        counts=(957, 4_082, 96_203),
        sha256="026b573b0b9f26bda7e71128d6da2ed1734ac00b92ac74f17531b1361a97ae4b",
    ),
    _frappe_ctr("frappe-ctr", read_frappe_positives, (957, 4_082, 154_186)),
    _frappe_ctr("frappe-ctr-rows", read_frappe_rows, (957, 4_082, 288_609)),
    Source(
        name="retailrocket",
        folder="retailrocket-mb",
        ways=(),
        marks=("train_mat_view.derived.npz",),
        read=read_retailrocket,
        licence=_RETAILROCKET,
        counts=(2_083, 29_521, 75_374),
        sha256="ebee0f10d777cb494c407c9881f8ffe673cec3069aa7731972fccc60621e8b51",
    ),
    Source(
        name="retailrocket-buys",
        folder="retailrocket-mb",
        ways=(),
        marks=("test_mat.derived.npz",),
        read=read_retailrocket_buys,
        licence=_RETAILROCKET,
        counts=(2_174, 30_113, 79_404),
        sha256="5785b81d23d4a95e862e277bff72abc5ca50f83b7b384dd350977858af01a454",
    ),
    Source(
        name="adult",
        folder="adult",
        ways=(
            tuple(
                Address(
                    url=f"https://archive.ics.uci.edu/ml/machine-learning-databases/adult/{file}"
                )
                for file in ADULT_FILES
            ),
        ),
        marks=("adult.data",),
        read=read_adult,
        licence=_ADULT,
        counts=(48_842, 1, 48_842),
        sha256="083457c351c4e190536cc3daa39252d4070ff899d8e2aa750ff45a4adf3fe7f4",
    ),
)

SOURCES: Mapping[str, Source] = MappingProxyType({source.name: source for source in _ALL})
"""Every known data set by its name."""


def find_source(name: str) -> Source:
    """Return the source of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in SOURCES:
        advice = did_you_mean(name, SOURCES) or f"; there are {', '.join(SOURCES)}"
        raise ConfigError(f"no data set {name!r} is known{advice}", name="name", value=name)
    return SOURCES[name]
