"""Croissant: a release's metadata as JSON-LD with the vocabulary of responsible AI.

MLCommons Croissant 1.0 (Akhtar et al., arXiv 2403.19546) and Croissant-RAI 1.0 (arXiv 2407.16883).
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiac_ldm.report.datasheet import whose

if TYPE_CHECKING:
    from cardiac_ldm.report.card import About

_TERMS = (
    "citeAs column extract field fileProperty fileObject fileSet format includes isLiveDataset jsonPath key md5 "
    "parentField path recordSet references regex repeated replace separator source subField transform"
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS.split()},
}


def croissant(folder: Path, about: "About", warnings: Sequence[str]) -> dict[str, Any]:
    """The JSON-LD of a release whose attributes.csv is there."""
    table = folder / "attributes.csv"
    with table.open() as file:
        columns = next(csv.reader(file))
    text = ("patient", "phase", "path", "labels")
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"volumes/{name}",
            "name": name,
            "description": name,
            "dataType": "sc:Text" if name in text else "sc:Float",
            "source": {"fileObject": {"@id": "attributes.csv"}, "extract": {"column": name}},
        }
        for name in columns
    ]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": about.name,
        "description": f"Synthetic short-axis cardiac MRI of {about.patients} patients whom nobody is, at end-diastole "
        f"and end-systole, with segmentations and attributes; {about.guarantee}.",
        "url": f"https://example.org/{about.name}",
        "license": about.licence,
        "creator": {"@type": "sc:Organization", "name": f"the holder of {about.cohort}"},
        "datePublished": about.date,
        "version": "1.0.0",
        "citeAs": f"{about.name}, made by cardiac_ldm {about.version} after Daum et al., arXiv 2407.16405",
        "isLiveDataset": False,
        "rai:dataCollection": f"Drawn by a latent diffusion model. {whose(about)} Attributes were requested from: "
        f"{about.attributes}.",
        "rai:dataCollectionType": ["Synthetic"],
        "rai:personalSensitiveInformation": ["none of a real person's; age and sex were made up or are of public data"]
        if not about.epsilon
        else [f"what was learnt from private patients is bounded by {about.guarantee}"],
        "rai:dataUseCases": ["development and teaching of methods; not validated for any clinical decision"],
        "rai:dataBiases": [
            "populations, scanners and diseases that the public and the private cohort lack are lacking here",
            "candidates were chosen by a public segmenter, so what it can't read is rarer than in patients",
        ],
        "rai:dataLimitations": [*warnings, "quality.html shows what was measured, beside what held-out patients reach"],
        "rai:dataSocialImpact": "Lets a population be studied without showing any of its patients.",
        "rai:dataAnnotationProtocol": "segmentations are what the decoder meant; nobody drew or checked them",
        "rai:dataReleaseMaintenancePlan": "none; a release that has been given away can't be called back",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "attributes.csv",
                "name": "attributes.csv",
                "contentUrl": "attributes.csv",
                "encodingFormat": "text/csv",
                "sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "volumes",
                "name": "volumes",
                "description": "a row for each synthetic patient and phase; attributes are those requested",
                "field": fields,
            }
        ],
    }
