"""Names that tell which token it is."""

from tests.cluster.fakes import ByteTokenizer, tokens
from twotower.text.token_names import TokenNames
from twotower.text.token_texts import TokenTexts


class TwoAs(ByteTokenizer):
    """Token 300 has the text of another one."""

    def decode(self, token_ids: object) -> str:
        return super().decode([tokens("a")[0] if token == 300 else token for token in token_ids])  # type: ignore


def test_text_where_it_tells_the_token_else_the_id() -> None:
    names = TokenNames(TokenTexts(ByteTokenizer()))
    assert names.of(tokens("a ")) == ["a", " "]
    assert names.of([2, *tokens("é")]) == ["token_id:2", "token_id:199", "token_id:173"]
    assert TokenNames(TokenTexts(None)).of([5, 6]) == ["token_id:5", "token_id:6"]


def test_of_two_tokens_with_one_text_the_first_has_it() -> None:
    names, [a, b] = TokenNames(TokenTexts(TwoAs())), tokens("ab")
    assert names.valued([(300, -3.0), (a, -1.0), (b, -2.0)]) == {"a": -3.0, f"token_id:{a}": -1.0, "b": -2.0}
    assert names.valued([(a, -1.0), (300, -3.0)]) == {"a": -1.0, "token_id:300": -3.0}
    assert names.valued([(b, -2.0), (a, -1.0), (b, -2.0)]) == {"b": -2.0, "a": -1.0}, "itself among the likeliest"
