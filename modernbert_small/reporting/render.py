"""The templates of the report and of the model card, and how they are filled."""

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

_ENVIRONMENT = Environment(
    loader=PackageLoader("modernbert_small.reporting"),
    autoescape=select_autoescape(["html"], default=False),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: object) -> str:
    """Fill a template of the folder `templates`.

    Args:
        template: its file name. In `.html` every value is escaped, unless it is `markupsafe.Markup`.
        values: by their names in the template. One that the template uses and that is missing is an error.
    """
    return _ENVIRONMENT.get_template(template).render(values)
