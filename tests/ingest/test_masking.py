"""A labelled list of what is masked and what stays, with the rates of misses and false alarms."""

from __future__ import annotations

import time

import pytest

from bp_spark.ingest.masking import masked

PHONES = """
138 0013 8000|13800138000|138-0013-8000|138.0013.8000|138  0013  8000|1380 013 8000|+86 138 0013 8000|0086 138 0013 8000
86 138 0013 8000|(010) 1234 5678|010-12345678|0755 8888 8888|021.1234.5678|（021）12345678
030 1234567|030/1234567|030 / 123 45 67|(030) 1234567
0170 1234567|0151-23456789|0151 2345 6789|08912345678|+49 (0)30 1234567
0049 30 1234567|00491701234567|0221.1234567
06 12 34 56 78|06.12.34.56.78|06-12-34-56-78|0612345678|+33 6 12 34 56 78|06 12 34 56 78|01 23 45 67 89
020 7946 0958|07700 900123|(0161) 496 0000|07911123456|+44 20 7946 0958|07911  123  456
98765 43210|98765-43210|9876543210|+91 98765 43210|098765 43210|022-2345 6789|080 2345 6789|91 98765 43210
090-1234-5678|03-1234-5678|09012345678|(03) 1234-5678|+81 90 1234 5678|０９０－１２３４－５６７８
010-1234-5678|02-123-4567|031-123-4567|01012345678|010.1234.5678|+82 10 1234 5678
(555) 123-4567|555-123-4567|555.123.4567|555 123 4567|(212)  555-0123
1-800-555-0199|+1 (555) 123-4567|2125550123|1 (212) 555 0123
"""
CARDS = """
4111 1111 1111 1111|4111-1111-1111-1111|4111.1111.1111.1111|4111  1111  1111  1111|4111 1111 1111 1111|4111111111111111
(4111) 1111 1111 1111|3782-822463-10005|5555 5555 5555 4444|6222021234567890128|3056 930902 5904|2223 0031 2200 3222
"""
IDS = """
11010519491231002X|11010519491231002Ｘ|110105 19491231 002X
110105 1949 1231 002 X|１１０１０５１９４９１２３１００２Ｘ|110105491231002
110105 491231 002|110105-19491231-002x
"""
IBANS = """
GB82 WEST 1234 5698 7654 32|DE89370400440532013000
DE89 3704 0044 0532 0130 00|DE89  3704 0044 0532 0130 00|de89 3704 0044 0532 0130 00
FR14 2004 1010 0505 0001 3M02 606|NL91-ABNA-0417-1643-00|MT84 MALT 0110 0001 2345 MTLC AST0 01S
"""
EMAILS = """
anna.b+x@example.co.uk|josé@exämple.de|Jürgen.Müller@bücher.example
用户@例子.中国|测试@例子.公司|张三@qq.com|анна@почта.рф
परीक्षा@उदाहरण.भारत|anna@xn--bcher-kva.example|hong@한국.com|用户＠例子．中国|o'neil@example.org|a_1@sub.example.com
"""
UNTOUCHED = """
red shoes size 42|iphone 15 pro 256gb|iPhone 15 128GB 黑色|牛奶 250ml*24|price was $1,299.00 in 2023, 1.099,00 € in 2024
order 20240501123456 never came|订单号2024050112345678还没到
order 4111111111111112|订单110105194912310021|SM-G998B, WH-1000XM4
990-1000-22|1080p 144hz 27 inch, 2560x1440, 16:9
from 12:30 to 18:45 on 2024-05-01|ISBN 978-3-16-148410-0, EAN 4006381333931
DE12345678901234567890 is no account|5000000 points @ home
2.5米*1.8米 100-200元|01.05.2024 10:30|am 01.05.24 um 10 Uhr 30
2024/05/01 12 30|von 01.02.2024 bis 03.04.2024|05/10/2023 06/11/2023|1 299 000 won|12.000.000 Rp|99,99 € statt 129,99 €
order 9876543210|Order No. 2125550123|Bestellnummer 0301234567
Auftragsnr. 030 1234567|invoice #5551234567|订单号13800138000
订单编号：13912345678|Artikel 402.758.14|Art.-Nr. 123.456.78
article 0306406152|ISBN 0-306-40615-2|ISBN 0306406152|SKU 9988776655
EAN 4006381333931|UPC 012345678905|tracking 0123456789
Sendungsnummer 00340434161094042557|028-1234567-1234567|302-1234567-1234567
Größe 38 40 42 44|36 38 40 42 44 46|size 10.5|EU 42 / US 8.5 / UK 7.5
90 x 200 cm|60x120x75|0,5 l|1,5-2,0 mm|0.5 - 0.75 mm
USB 3.0 128 GB|DDR5 6000 MHz|RTX 4090 24GB|Ryzen 7 7800X3D|i7-13700K|A4 80 g 500 Blatt|WH-1000XM5|BMW 11 42 7 566 327
A 000 989 82 01|1990 1991 1992 1993|1999-2024|19:30 - 22:15|24/7
50% off|3 for 2|100 100 100|10 20 30 40 50|1, 2, 3, 4, 5, 6, 7
2023 was bad, 2024 better|01067 Dresden|100000 Beijing|90210
SW1A 1AA|100元 200元 300元|满300减50|2024年5月1日|第12345678号
1700000000|12345678|123456789012|8 800 mAh|20000 mAh|10000 mAh 22.5 W
5 @ 3.99|me@home|@anna|#12345678|v1.2.3.4|192.168.100.200
um 10 Uhr ist alles da|xs42 shirts are really nice and cheap|12345 Musterstadt
3,14159265358979|1.000.000,00|0.1234567891|x2 x3 x4
"""
SENTENCES = {
    "call {} please": "call {} please",
    "我的号码是{}，谢谢": "我的号码是{}，谢谢",
    "Tel.: {}.": "Tel.: {}.",
}


def _lines(listed: str) -> list[str]:
    return [text for line in listed.strip().splitlines() for text in line.split("|")]


def test_what_is_listed_is_masked_and_ordinary_texts_stay() -> None:
    kinds = {"<phone>": PHONES, "<card>": CARDS, "<id>": IDS, "<iban>": IBANS, "<email>": EMAILS}
    personal = [(value, name) for name, listed in kinds.items() for value in _lines(listed)]
    ordinary = _lines(UNTOUCHED)
    assert len(personal) + len(ordinary) >= 150
    missed = [(value, masked(value)) for value, name in personal if masked(value) != name]
    for sentence in SENTENCES:
        # Nothing but the address itself may go where a script writes no space before it: only the first fits them all.
        for value, name in personal:
            text = sentence.format(value)
            if (name != "<email>" or "}，" not in sentence) and masked(text) != sentence.format(name):
                missed.append((text, masked(text)))
    false_alarms = [(text, masked(text)) for text in ordinary if masked(text) != text]
    assert missed == []
    assert false_alarms == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("030 1234567 / 0170 1234567", "<phone> / <phone>"),
        ("06 12 34 56 78 06 98 76 54 32", "<phone> <phone>"),
        ("4111 1111 1111 1111 2 pieces", "<card> 2 pieces"),
        ("13912345678 4111111111111111", "<phone> <card>"),
        ("030 1234567 2 pieces", "<phone> 2 pieces"),
        ("我的邮箱是zhang_3@qq.com谢谢", "我的邮箱是<email>谢谢"),
        ("Größe ４２, 0170 1234567", "Größe ４２, <phone>"),
    ],
)
def test_values_beside_other_numbers_are_masked_alone(text: str, wanted: str) -> None:
    assert masked(text) == wanted


def test_a_text_made_to_be_slow_is_not() -> None:
    started = time.monotonic()
    for part in ("1 ", "@", "a@", "a.", "GB82 WEST ", "a1", "9", "01.02."):
        masked(part * (100_000 // len(part)))
    assert time.monotonic() - started < 20
