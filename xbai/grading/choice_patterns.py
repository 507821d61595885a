"""How responses name an option, in Chinese and English, put together from parts. The text is in NFKC form."""

import re

# What may stand around a letter: space, quotes, emphasis, brackets, LaTeX.
_BRACKET = r"()\[\]{}<>【】「」『』《》〈〉〔〕"
_MARK = rf"[*_`~'\"“”‘’${_BRACKET}]|\\[()\[\]]|\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it|sf)|bm|boxed|fbox)\s*+\{{"
_AROUND = rf"(?:[ \t]|{_MARK})*+"
_AROUND_LINES = rf"(?:\s|{_MARK})*+"
_COLON = rf"{_AROUND_LINES}(?:[:=→]|-+>?|[–—])?"
_NOUN = r"(?:选项|第|选(?!择?题)|(?i:option|choice))?"
_NOUN_AFTER = rf"{_AROUND}(?:选?项)?{_AROUND}"

# What an option is said to be. A sentence may only begin so: A对B有利, "A right triangle", "Is A correct?".
_IS = r"(?:是|为|属于|显然|明显|并|都|均|(?:is|was|looks|seems|clearly|definitely|the)\b|[ \t])*+"
_WRONG = r"错|误|有误|不(?:正确|对|符|成立|可能|准确|合)|(?:not|in)[ \t]*+(?:correct|right)|not[ \t]|n't|wrong|false"
_RIGHT = (
    rf"{_IS}(?:正确|对)(?:的|无误)?(?:选项|说法|描述|表述|叙述)?(?=[ \t]*+(?:[,.;!。、)*]|\n|\Z))"
    rf"|[ \t]*+(?:is|was|looks|seems)\b{_IS}(?i:correct|right)\b(?![ \t]*+\?)"
)

# One letter that is an option: no part of a word or formula, not "I think"; not refuted or asked about (选A错误).
_LETTER = r"(?:[A-HJ]|I(?!['’]|[ \t]+[a-z]))(?![A-Za-z0-9])"
_FORMULA = r"[ \t]*+(?:[=+^≠≤≥∪∩]|_\w|\\(?!boxed|fbox|text|q?quad)[A-Za-z])"
_ASKED = r"吗|呢|的话|时|则|\?"
_REFUTED = rf"[ \t]*+(?:选?项)?(?:{_IS}(?:{_WRONG})|[ \t]*+(?:{_ASKED}))"
# Several letters are no choice, but a statement all the same: "A or C", AC. Not so "A, C is wrong".
_JOINED = rf"{_AROUND}(?:(?:or|and|nor|还是|或者?|和|以?及|与|[/,、&;])[ \t]*+)?{_NOUN}{_AROUND}"
_OTHER = rf"{_LETTER}(?![ \t]*+(?:选?项|错|不|是|的|is|are|has|was))(?!{_FORMULA})"
_LETTERS = rf"(?:[A-J]{{2,}}(?![A-Za-z0-9])|{_LETTER}(?!{_FORMULA})(?!{_REFUTED}))(?:{_JOINED}{_OTHER}){{0,9}}+"
# A small letter ends the sentence, or stands in brackets; after an English word "a" without a full stop is an article.
_ENDS = rf"(?={_AROUND}[.。!]?{_AROUND}(?:\n|\Z))"
_SMALL = rf"(?:[b-h]{_ENDS}|a(?=[.。]){_ENDS}|(?<![A-Za-z][ ])a{_ENDS}|(?<=\()[a-h](?=\)))"

# What leads to an option: 答案应该是, "the answer to this question is".
_ADVERB = (
    r"(?:应该|应当|应|就|则|即|便|只能|只|当然|显然|自然|肯定|一定|必然|无疑|最终|确实"
    r"|therefore|thus|hence|then|clearly|indeed|definitely|most|likely|probably|actually|simply|\s)*+"
)
_ENGLISH_IS = rf"(?i:\s*+\b(?:is|was|(?:would|should|must|will|has[ ]to)[ ]be)\b{_ADVERB})"
_OF_QUESTION = r"(?:[ ](?:to|for|of)[ ](?:this|the|your|my|question|problem)(?:[ ][a-z]+){0,3}?)?"
_ANSWER = [
    rf"(?i:\banswers?(?:\s+(?:option|choice))?){_OF_QUESTION}{_AROUND_LINES}{_ENGLISH_IS}?",
    rf"答案{_AROUND_LINES}{_ADVERB}(?:选择|选(?!项)|是|为)?{_ADVERB}",
]
# 正确的选项就是, 选项：, "the correct option is".
_RIGHT_OPTION = [
    rf"(?i:\b(?:correct|right|best|final|my)\s+(?:option|choice|one)){_AROUND_LINES}(?:{_ENGLISH_IS}|(?=:))",
    rf"(?:选项|(?<!不)正确的?(?:选项|说法|一项|表述|描述|叙述)?){_AROUND_LINES}(?:{_ADVERB}(?:是|为)|(?=:))",
]
# 本题应该选, "so I would choose". Not 不选, 如果选, 为什么选, 备选, "if I choose".
_WE = r"\b(?i:(?<!if )(?:i|we|so|thus|hence|therefore)(?:'d|'m|,)?\s+(?:(?:would|will|should|must)\s+)?)"
_MAY = r"(?:应该|应当|应|可以|会|能|要|该|得|是|就)*+"
_UNLIKE_MAY = r"(?<![不别勿没未非误错漏备可候待若如果设么何易应该当会能以要得是就])"
_CHOOSE = [
    rf"{_WE}(?i:choose|select|pick|go(?:ing)? with)\b",
    rf"(?:(?<=所以)|{_UNLIKE_MAY}){_MAY}选择?(?!项)",
]
# Where the question is repeated, all its options follow: 下列正确的是 A. ... B. ...
_LIST = rf"{_AROUND_LINES}A[ \t*]*+[.、:)](?s:.){{0,1000}}?B[ \t*]*+[.、:)]"
_LEAD = (
    rf"(?:(?:{'|'.join(_ANSWER)})(?!{_AROUND}:?{_AROUND}\n{_LIST})"
    rf"|(?:{'|'.join(_RIGHT_OPTION + _CHOOSE)})(?!{_COLON}{_LIST}))"
)

# C是正确答案, "C is the answer".
_CALLED_ANSWER = (
    rf"{_NOUN_AFTER}(?:是|为|就是|is)[ \t]*+"
    r"(?i:the[ ])?(?:唯一)?(?:正确的?|(?i:correct|right|best))?[ \t]*+(?:答案|(?i:answer))"
)
# \boxed{C}, \boxed{\text{(C) text}}, \boxed{C. text}; other boxes that begin with a letter hold formulas.
_IN_BOX = rf"\\f?box(?:ed)?\s*+\{{{_AROUND_LINES}{_NOUN}{_AROUND_LINES}"
_TEXT_IN_BOX = r"(?=\s*+\}|\s+[\u4e00-\u9fff]|\s*+\\text|[.、:)](?!\s*+[A-Z0-9](?![A-Za-z0-9])))"

STATED = re.compile(
    rf"{_LEAD}{_COLON}{_AROUND_LINES}{_NOUN}{_AROUND_LINES}(?P<led>{_LETTERS}|{_SMALL})"
    rf"|(?<![A-Za-z0-9])(?P<subject>{_LETTERS}){_CALLED_ANSWER}"
    rf"|{_IN_BOX}(?P<boxed>[A-J]){_TEXT_IN_BOX}"
)
"""A statement of the answer; of its groups, the last one to match holds the letter, or several."""

JUDGED = re.compile(
    rf"(?<![A-Za-z0-9])(?P<option>{_LETTER}(?:{_JOINED}{_LETTER}){{0,9}}+){_NOUN_AFTER}"
    rf"(?:中?的?(?:说法|描述|表述|叙述|内容))?(?:{_IS}(?P<wrong>{_WRONG})|(?P<right>{_RIGHT}))"
)
"""An option (or several) that is called right or wrong."""

LABEL = re.compile(r"(?<![A-Za-z0-9])\(?([A-J])\)?[ \t]*[.、):]")
"""An option's letter as it stands before its text."""

ALONE = re.compile(
    rf"{_AROUND}{_NOUN}{_AROUND}(?P<letter>[A-J]|(?<![A-Za-z] )[a-h])(?![A-Za-z0-9])"
    rf"(?:{_AROUND}[.。]?{_AROUND}|[*]*+[ \t]*+[)\]】」》>.、:](?![ \t]*+[A-J](?![A-Za-z0-9])).*)"
)
"""A line that is one option, with its text or without."""
