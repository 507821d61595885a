"""C-Eval (Huang et al., arXiv 2305.08322): Chinese four-way multiple choice in 52 subjects."""

from xbai.benchmarks.base import Benchmark, Question, Row
from xbai.errors import UserError

OPTIONS = ("A", "B", "C", "D")

_SUBJECTS = (
    "computer_network 计算机网络, operating_system 操作系统, computer_architecture 计算机组成",
    "college_programming 大学编程, college_physics 大学物理, college_chemistry 大学化学",
    "advanced_mathematics 高等数学, probability_and_statistics 概率统计, discrete_mathematics 离散数学",
    "electrical_engineer 注册电气工程师, metrology_engineer 注册计量师, high_school_mathematics 高中数学",
    "high_school_physics 高中物理, high_school_chemistry 高中化学, high_school_biology 高中生物",
    "middle_school_mathematics 初中数学, middle_school_biology 初中生物, middle_school_physics 初中物理",
    "middle_school_chemistry 初中化学, veterinary_medicine 兽医学, college_economics 大学经济学",
    "business_administration 工商管理, marxism 马克思主义基本原理",
    "mao_zedong_thought 毛泽东思想和中国特色社会主义理论体系概论, education_science 教育学",
    "teacher_qualification 教师资格, high_school_politics 高中政治, high_school_geography 高中地理",
    "middle_school_politics 初中政治, middle_school_geography 初中地理, modern_chinese_history 近代史纲要",
    "ideological_and_moral_cultivation 思想道德修养与法律基础, logic 逻辑学, law 法学",
    "chinese_language_and_literature 中国语言文学, art_studies 艺术学, professional_tour_guide 导游资格",
    "legal_professional 法律职业资格, high_school_chinese 高中语文, high_school_history 高中历史",
    "middle_school_history 初中历史, civil_servant 公务员, sports_science 体育学, plant_protection 植物保护",
    "basic_medicine 基础医学, clinical_medicine 临床医学, urban_and_rural_planner 注册城乡规划师",
    "accountant 注册会计师, fire_engineer 注册消防工程师, environmental_impact_assessment_engineer 环境影响评价工程师",
    "tax_accountant 税务师, physician 医师资格",
)
SUBJECTS = dict(subject.split() for line in _SUBJECTS for subject in line.split(", "))
"""The Hub dataset's configurations, and what an exam paper calls them."""

INSTRUCTION = (
    "让我们一步一步思考。你的回复的最后一行应遵循以下格式：'ANSWER: $LETTER'（不带引号），"
    "其中 LETTER 是选项 ABCD 中的一个。"
)


def question_text(row: Row) -> str:
    """A row of the Hub dataset (`question`, `A`...`D`, and its `subject`) as the prompt of the published results.

    Its braces and line ends belong to it: results with another prompt cannot be compared.
    """
    subject = SUBJECTS.get(row.get("subject", ""), "")
    options = "\n".join(f"{letter}. {{{row[letter]}}}" for letter in OPTIONS)
    return (
        f"\n以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n"
        f"{{{row['question']}}}\n{options}\n{INSTRUCTION}\n"
    )


class CEval(Benchmark):
    """Reads ready-made prompts (`model_input`) and the Hub dataset's own columns.

    The answers of its test split are not public: they stand there as empty texts, and its responses get no grade.
    """

    name = data_source = "ceval"
    lang = "zh"
    instruction = INSTRUCTION
    instruction_marks = ("ANSWER:", "ANSWER：", "答案：", "答案:")

    def question_from_row(self, index: int, row: Row, place: str) -> Question:
        """Puts question and options together where they are columns of their own."""
        if all(row.get(letter) is not None for letter in OPTIONS) and row.get("question"):
            row = {"prompt": question_text(row), **{k: v for k, v in row.items() if k not in ("question", *OPTIONS)}}
        return super().question_from_row(index, row, place)

    def answer_from_row(self, row: Row, place: str) -> str:
        """The right option's letter; empty where the row keeps it to itself."""
        if row.get("answer") == "":
            return ""
        answer = str(super().answer_from_row(row, place)).strip().upper()
        if answer not in OPTIONS:
            raise UserError(f"{place}: the answer must be one of {', '.join(OPTIONS)}, not {answer!r}")
        return answer
