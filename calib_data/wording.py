"""What the generated lines and pages say: street words, receipts, prose, in Latin letters and in Chinese.

Nothing is quoted: words come from the lists below, the rest is random numbers, codes and word salad that
keeps the statistics of real print (lengths, capitals, digits, punctuation). Latin text is printable ASCII
and nothing else, so that it does not depend on which recognizer is installed.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Rng = np.random.Generator


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The entries of a list written as prose; without a separator every word is one."""
    return tuple((text if separator is None else text.replace("\n", "")).split(separator))


MONTHS = _words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")

SIGNS = _words("""
open closed sale exit enter push pull welcome hotel bar cafe coffee bakery pizza grill sushi noodle tea juice
market store shop outlet mall plaza tower square garden park street road avenue lane bridge station bus taxi
metro airport gate lift stairs toilet parking stop slow school crossing danger caution warning notice private
keep clear way left right north south east west up down new free best hot cold fresh daily special offer price
save only now today tomorrow bank atm cash exchange pharmacy clinic dental optics salon spa barber beauty
fashion shoes sports books music video games toys phone repair service center office rent lease for the of and
to at on in by you we your our all more less big small house home kitchen dining express royal golden silver
happy lucky sunny lotus dragon tiger panda eagle falcon orchid maple cedar river harbour ocean island mountain
city world global union central grand prime first second third level floor room unit block zone area fire hose
emergency water power light no smoking entry mind step wet paint customers visitors staff deliveries reception
tickets information travel tours summer winter spring autumn festival theatre cinema museum gallery library
experience quality premium classic original natural organic chocolate vanilla strawberry chicken burger kebab
""")

NOUNS = _words("""
analysis method result system model paper region surface sample process report company market growth policy
water energy network signal structure material pressure temperature section figure table chapter history
government agency project budget season village teacher student language culture machine engine vehicle bridge
farmer product quality supply demand measure standard theory experiment solution distance velocity layer filter
memory frame image kernel boundary parameter estimate error variance constraint equation function property
protein cell tissue patient treatment hospital medicine climate forest river valley mountain island weather
garden window kitchen letter answer question reason moment morning evening journey station harbour traveller
committee member meeting agreement notice hearing comment statement document permit licence address office
""")

VERBS = _words("""
shows describes requires increases reduces follows contains provides explains supports suggests measures
produces compares improves considers includes reaches changes remains becomes develops protects carries finds
was were is are has had gives makes takes holds brings leaves keeps sends builds draws reads writes opens
""")

ADJECTIVES = _words("""
important local general recent large small second final public natural early strong simple possible different
annual regional significant linear random stable complex modern ancient quiet bright narrow deep whole common
average initial relative thermal optical digital rural urban western northern private available necessary
""")

LINKS = _words("""
of in on for with from by under over between within into through during after before because while although
which that and but or as than when where if to at about against among without toward per both
""")

FIRST_NAMES = _words("""
Anna Omar Nadia Victor Lena Farid Grace Hugo Mei Ivan Priya Jonas Aisha Carlos Wendy Tomas Ravi Helen Daniel
Siti Kumar Lucy Peter Amir Rosa Felix Norah Kenji Maria Oscar Julia Samuel Tara Leon Irene Adam Fatimah Bruno
""")

LAST_NAMES = _words("""
Tan Lim Wong Ahmad Garcia Novak Schmidt Larsen Okoye Singh Moreau Costa Petrov Haddad Nguyen Park Sato Murphy
Keller Rossi Abdullah Fischer Brandt Ortega Lindqvist Kowalski Baker Carter Dawson Ellis Foster Hughes Jensen
""")

STREETS = _words("""
Jalan Taman Lorong Persiaran Main High Station Church Mill Victoria Harbour Orchard Cedar Maple Sunset Kings
Queens Albert Park Hill Lake Temple Market Bukit Sungai Utama Perdana Indah Jaya Maju Makmur Seri Permai
""")

GOODS = _words("""
bread milk eggs rice sugar salt butter cheese yogurt apple banana mango grape onion tomato potato chicken beef
fish prawn noodles soup coffee latte mocha tea cola lemon juice water beer wine soap shampoo tissue towel
battery cable charger adapter pen pencil paper file folder stapler tape glue brush paint nail screw hinge bolt
pipe valve switch lamp bulb socket plate bowl cup spoon glass kettle filter oil brake wiper tyre
""")

RECEIPT_HEADS = _words(
    """
TAX INVOICE|CASH RECEIPT|RECEIPT|INVOICE|SALES SLIP|CUSTOMER COPY|THANK YOU|PLEASE COME AGAIN|OFFICIAL RECEIPT|
SIMPLIFIED TAX INVOICE|Welcome|Thank you for shopping with us|Goods sold are not refundable|DUPLICATE COPY|
Terms and conditions apply|Have a nice day|ORDER SUMMARY|CASH SALES|DELIVERY NOTE|*** REPRINT ***
""",
    "|",
)

RECEIPT_LABELS = _words(
    """
Total|Sub Total|Net Total|Grand Total|Cash|Change|Rounding Adj|Discount|Tax 6%|GST @6%|VAT 20%|Service 10%|Visa|
Card|Amount Due|Balance|Total Qty|Points|Deposit|TOTAL INCL. GST|Total Excl. Tax|Amount|Paid|Tip
""",
    "|",
)

RECEIPT_FIELDS = _words(
    """
Invoice No|Receipt #|Cashier|Date|Time|Tel|Fax|GST ID|Reg No|Table|Counter|Terminal|Trans|Doc No|Member|Bill No|
Order|Ref|Approval Code|Co. Reg|POS|Server|Batch|Slip No
""",
    "|",
)

CHINESE_WORDS = _words("""
中国 北京 上海 广州 深圳 银行 酒店 餐厅 超市 药店 医院 学校 大学 车站 地铁 出口 入口 停车场 洗手间 欢迎 光临
营业 时间 电话 地址 热线 特价 优惠 打折 新品 火锅 面馆 奶茶 咖啡 水果 蔬菜 牛肉 豆腐 米饭 早餐 晚餐 外卖
公司 有限 科技 服务 中心 管理 经济 发展 社会 建设 农业 工业 市场 政府 教育 文化 历史 研究 分析 方法 结果
问题 系统 数据 模型 技术 信息 网络 安全 环境 资源 能源 水平 质量 标准 生产 企业 投资 增长 同比 亿元 项目
我们 他们 可以 没有 这个 那个 一个 因为 所以 但是 如果 通过 进行 提高 实现 加强 推动 促进 以及 主要 重要
今天 明天 早上 晚上 春天 夏天 山水 河流 森林 天空 阳光 花园 道路 房屋 老师 学生 孩子 朋友 家庭 生活 工作
小心 注意 禁止 吸烟 请勿 安静 危险 推 拉 开 关 美容 理发 眼镜 钟表 手机 维修 家具 服装 图书 体育 音乐 电影
""")

CHINESE_FIELDS = _words(
    """
合计|小计|应收|实收|找零|数量|单价|金额|日期|时间|收银员|流水号|单号|桌号|电话|地址|会员卡|折扣|发票号码|税额
""",
    "|",
)

CHINESE_GOODS = _words(
    "牛奶 鸡蛋 面包 大米 食盐 白糖 苹果 香蕉 西瓜 猪肉 鸡腿 鲜虾 青菜 豆浆 可乐 啤酒 毛巾 肥皂 电池 纸巾"
)

_PACKAGE, _DICTIONARY = "rapidocr_paddle", Path("ch_ppocr_rec", "ppocr_keys_v1.txt")


@lru_cache(maxsize=1)
def alphabet() -> frozenset[str]:
    """The characters that may be drawn: the recognizer's dictionary and the space, else printable ASCII."""
    spec = find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    file = Path(next(iter(folders))) / _DICTIONARY if folders else None
    if file is None or not file.is_file():
        return frozenset(string.printable[:95])
    return frozenset(line for line in file.read_text(encoding="utf-8").split("\n") if len(line) == 1) | {" "}


@lru_cache(maxsize=1)
def ideographs() -> tuple[str, ...]:
    """The common Chinese characters (first level of GB 2312) that the dictionary knows, in code order."""
    rows = (bytes((high, low)).decode("gb2312", "ignore") for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    return tuple(char for char in rows if char and char in alphabet())


def pick(rng: Rng, items: Sequence[str]) -> str:
    """One item, each as likely as the other."""
    return items[int(rng.integers(len(items)))]


def _digits(rng: Rng, count: int) -> str:
    return "".join(str(int(d)) for d in rng.integers(0, 10, count))


def _code(rng: Rng) -> str:
    letters = "".join(chr(65 + int(k)) for k in rng.integers(0, 26, int(rng.integers(1, 4))))
    number = _digits(rng, int(rng.integers(3, 9)))
    return (letters + number, number + "-" + letters[:1], f"{letters}/{number}", number)[int(rng.integers(4))]


def price(rng: Rng) -> str:
    """An amount of money, with or without a currency."""
    value = float(np.exp(rng.normal(2.8, 1.4)))
    amount = f"{value:,.2f}" if rng.random() < 0.8 else f"{value:.2f}"
    return pick(rng, ("", "", "", "", "$", "RM", "RM ", "EUR ", "-")) + amount


def _date(rng: Rng) -> str:
    day, month, year = int(rng.integers(1, 29)), int(rng.integers(1, 13)), int(rng.integers(1995, 2027))
    name = MONTHS[month - 1]
    forms = (f"{day:02}/{month:02}/{year}", f"{year}-{month:02}-{day:02}", f"{day} {name} {year}",
             f"{day:02}.{month:02}.{year % 100:02}", f"{name} {day}, {year}")  # fmt: skip
    return pick(rng, forms)


def _clock(rng: Rng) -> str:
    hour, minute, second = (int(v) for v in rng.integers(0, (24, 60, 60)))
    return pick(rng, (f"{hour:02}:{minute:02}", f"{hour:02}:{minute:02}:{second:02}",
                      f"{hour % 12 or 12}:{minute:02} {'AM' if hour < 12 else 'PM'}"))  # fmt: skip


def _phone(rng: Rng) -> str:
    a, b, c = _digits(rng, 3), _digits(rng, 4), _digits(rng, 4)
    return pick(rng, (f"0{a[0]}-{b}{c}", f"({a}) {b}-{c}", f"+{a[:2]} {a[2]}{b[:2]} {c} {b}", f"{a}.{b[:3]}.{c}"))


def _name(rng: Rng) -> str:
    return f"{pick(rng, FIRST_NAMES)} {pick(rng, LAST_NAMES)}"


def _address(rng: Rng) -> str:
    number, place = int(rng.integers(1, 400)), f"{pick(rng, STREETS)} {pick(rng, STREETS)}"
    town, code = pick(rng, STREETS) + pick(rng, (" City", " Town", "", " Jaya")), _digits(rng, 5)
    return pick(rng, (f"No. {number}, Jalan {place},", f"{number} {place} Street", f"{code} {town}",
                      f"Lot {number}, {place} {int(rng.integers(1, 30))}/{int(rng.integers(1, 9))},",
                      f"{town}, {code}", f"P.O. Box {number}, {town}"))  # fmt: skip


def _title(rng: Rng, text: str) -> str:
    roll = rng.random()
    return text.upper() if roll < 0.5 else text.title() if roll < 0.85 else text


def _number_sign(rng: Rng) -> str:
    a, b = int(rng.integers(1, 100)), int(rng.integers(1, 1000))
    return pick(rng, (f"{a}%", f"{b}", f"#{a:02}-{b:02}", f"${a}.{b % 100:02}", f"{a}km", f"B{a % 10}", f"{b}{a}",
                      f"{a % 12 + 1}pm", f"No.{a}", f"{a}/{b}", _clock(rng), _phone(rng), _digits(rng, 4)))  # fmt: skip


def street_text(rng: Rng) -> str:
    """What stands on a sign: mostly one short word, often in capitals, now and then a number."""
    roll = rng.random()
    if roll < 0.14:
        return _number_sign(rng)
    if roll < 0.22:
        return pick(rng, FIRST_NAMES + LAST_NAMES) + pick(rng, ("", "", "'s"))
    if roll < 0.27:
        return pick(rng, (f"www.{pick(rng, SIGNS)}.com", f"{pick(rng, SIGNS)}@mail.com", _code(rng)))
    words = _title(rng, " ".join(pick(rng, SIGNS) for _ in range(1 + int(rng.random() < 0.15))))
    return words + pick(rng, ("",) * 9 + ("!", ".", ",", ":", "?", "&"))


def item(rng: Rng) -> str:
    """The name of a thing sold, as it stands on a receipt."""
    goods = f"{pick(rng, ADJECTIVES)} {pick(rng, GOODS)}" if rng.random() < 0.5 else pick(rng, GOODS)
    size = pick(
        rng, ("", "", f" {int(rng.integers(1, 20)) * 50}g", f" {int(rng.integers(1, 12))}PCS", f" {_code(rng)}")
    )
    return _title(rng, goods) + size


def field(rng: Rng) -> str:
    """A labelled entry such as `Invoice No: 12345`."""
    value: Callable[[Rng], str] = (_code, _date, _clock, _phone, _name, _code)[int(rng.integers(6))]
    return pick(rng, RECEIPT_FIELDS) + pick(rng, (": ", " : ", ":", " ")) + value(rng)


def receipt_text(rng: Rng) -> str:
    """One line, or one cell, of a receipt."""
    roll = int(rng.integers(10))
    if roll < 3:
        return field(rng)
    if roll == 3:
        return pick(rng, RECEIPT_HEADS)
    if roll == 4:
        company = pick(rng, ("SDN BHD", "LTD", "INC.", "Trading", "Mart"))
        return f"{_title(rng, pick(rng, SIGNS) + ' ' + pick(rng, SIGNS))} {company}"
    if roll == 5:
        return _address(rng)
    if roll == 6:
        return f"{pick(rng, RECEIPT_LABELS)}: {price(rng)}"
    return pick(rng, (price(rng), _date(rng), f"{_date(rng)} {_clock(rng)}", item(rng), item(rng),
                      f"{int(rng.integers(1, 20))} x {price(rng)}", f"({_code(rng)})"))  # fmt: skip


def _clause(rng: Rng) -> list[str]:
    subject = ["the", pick(rng, ADJECTIVES), pick(rng, NOUNS)] if rng.random() < 0.5 else [pick(rng, NOUNS)]
    return [*subject, pick(rng, VERBS), "a" if rng.random() < 0.3 else "the", pick(rng, NOUNS), pick(rng, LINKS),
            pick(rng, ADJECTIVES), pick(rng, NOUNS)]  # fmt: skip


def document_text(rng: Rng, width: int = 0) -> str:
    """A stretch of running prose, cut anywhere between words as line breaks cut it.

    Args:
        width: aimed-at number of characters; 0 draws one between 8 and 58.
    """
    width = width or int(rng.integers(8, 59))
    words: list[str] = []
    while sum(map(len, words)) + len(words) < width + 12:
        clause = _clause(rng)
        extra = pick(
            rng, ("",) * 7 + (f"({int(rng.integers(1, 40))})", _date(rng), f"{rng.random() * 100:.1f}%", _name(rng))
        )
        clause[0], clause[-1] = clause[0].capitalize(), clause[-1] + pick(rng, (".", ".", ",", ";", ":", "?"))
        words += clause + ([extra] if extra else [])
    start = int(rng.integers(0, 4))
    end = start + 1
    while end < len(words) and len(" ".join(words[start : end + 1])) <= width:
        end += 1
    return " ".join(words[start:end])


def chinese_street(rng: Rng) -> str:
    """A Chinese sign of one to six characters, sometimes with digits or Latin letters."""
    words = "".join(pick(rng, CHINESE_WORDS) for _ in range(int(rng.integers(1, 4))))
    return words + pick(rng, ("", "", "", "", _digits(rng, 2), "!", "24H", "·" + pick(rng, SIGNS).upper()))


def chinese_receipt(rng: Rng) -> str:
    """One line, or one cell, of a Chinese receipt."""
    label = pick(rng, CHINESE_FIELDS)
    fields = (f"{label}：{price(rng)}", f"{label}:{_code(rng)}", f"{label}:{_date(rng)}", pick(rng, CHINESE_GOODS))
    return pick(rng, (*fields, f"{pick(rng, CHINESE_GOODS)} {int(rng.integers(1, 9))} {price(rng)}", label))


def chinese_document(rng: Rng, width: int = 0) -> str:
    """Running Chinese text: known words mixed with rarer characters, so that many different ones are seen.

    Args:
        width: aimed-at number of characters; 0 draws one between 4 and 30.
    """
    width = width or int(rng.integers(4, 31))
    text = ""
    while len(text) < width + 4:
        rare = "".join(pick(rng, ideographs()) for _ in range(int(rng.integers(1, 5))))
        text += pick(rng, (pick(rng, CHINESE_WORDS), pick(rng, CHINESE_WORDS), rare))
        text += pick(
            rng, ("",) * 8 + ("，", "。", "、", "：", "；", "“", "”", "（", "）", str(int(rng.integers(0, 2030))))
        )
    start = int(rng.integers(0, 4))
    return text[start : start + width].strip()
