import pytest

from radt.attribution import license_of, url_of

CC = "https://creativecommons.org/licenses/by/2.0/"


@pytest.mark.parametrize(
    ("metadata", "license", "url"),
    [
        ({}, None, None),
        ({"url": "https://a.example/1.jpg", "license": "CC0"}, "CC0", "https://a.example/1.jpg"),  # img2dataset
        ({"URL": "https://a.example/1.jpg", "LICENSE": "?"}, None, "https://a.example/1.jpg"),  # LAION
        ({"URL": "", "LICENSE": CC, "NSFW": "UNLIKELY"}, CC, None),
        ({"image_url": "https://a.example/1.jpg", "page_url": "https://a.example"}, None, "https://a.example/1.jpg"),
        (
            {"licensename": "CC BY 2.0", "licenseurl": CC, "pageurl": "https://p.example"},
            "CC BY 2.0",
            "https://p.example",
        ),
        ({"License": CC, "OriginalURL": "https://o.example/1.jpg", "Author": "A"}, CC, "https://o.example/1.jpg"),
        ({"license": float("nan"), "url": None}, None, None),  # an empty cell of a data frame
        ({"license": 4, "url": " "}, "4", None),  # COCO's numbers
        ({"license": {"name": "CC0"}, "source": "museum"}, None, "museum"),
    ],
)
def test_licence_and_source_are_found_by_their_common_names(metadata, license, url):
    assert license_of(metadata) == license
    assert url_of(metadata) == url
