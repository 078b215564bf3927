"""What texts say of an image that is not true of it any more when it is moved or flipped.

In English, German, French, Spanish, Italian, Portuguese, Russian, Chinese, Japanese, Korean, Arabic
and Hindi. A word too many costs a sample's flip, a word too few makes its text wrong.
"""

import re
import unicodedata
from collections.abc import Iterable

from torchtune_vl.chat._boxes import GEOMETRY

_NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)%?"
_PLACES = re.compile(
    # [12, 34], (12 34), <12;34> and the like; four numbers without any bracket
    rf"[\[({{<]\s*{_NUMBER}(?:[\s,;]+{_NUMBER})+\s*[\])}}>]|(?<![\d.])(?:{_NUMBER}\s*,\s*){{3}}{_NUMBER}|"
    # "x": 12, left=12, click(x='12')
    rf"{GEOMETRY.pattern}\w{{0,9}}[\"']?\s*[:=]\s*[\"'\[({{<]*\s*{_NUMBER}|"
    r"<[|/]*(?:b?box|quad|point|poly|loc)|\d\s*(?:px\b|pixel)",
    re.IGNORECASE,
)


def _words(begins: str, parts: str) -> re.Pattern[str]:
    """Finds words that begin so, and what is found in any place."""
    # Python counts "_" among letters: top_left
    pattern = rf"(?<![^\W_])(?:{begins})|{parts}"
    return re.compile(unicodedata.normalize("NFC", pattern), re.IGNORECASE)


_DIRECTIONS = _words(
    "(?:top|upper|bottom|lower)?(?:left|right)|(?:north|south|nord|süd)?(?:east|west)|mirror|flip|"
    "revers|starboard|direction|"
    r"link[se]|recht[es]|(?:nord|süd)?(?:osten|östl|ost\b)|spiegel|richtung|"
    r"gauche|droit|ouest|(?:nord|sud|à l).?est\b|sens horaire|aiguilles d|miroir|"
    r"izquierd|derech|oeste|(?:al|del|nor|sur|su)d? ?este\b|horari|agujas|espejo|"
    r"sinistr|destr[aoie]\b|ovest|ad? est\b|orari[oa]|specchi|"
    "esquerd|direit|leste|horári|espelh|"
    r"лев[аоые]|прав[аоыу]|слев|справ|влев|вправ|налев|направ|правее|восто|запад|"
    r"часов\w+ стрел|зеркал",
    "clockwise|o.clock|links|rechts|uhrzeiger|oeste|"
    "左|右|[东西東][边邊面方侧側部北南]|[南北向][东西東]|[顺逆順]时针|[順逆]時針|[镜鏡]|時計回り|"
    "왼|오른|[좌우]측|좌우|동쪽|서쪽|시계 ?방향|거울|"
    "يسار|يمين|[أا]يسر|[أا]يمن|يسرى|يمنى|شرق|غرب|عقارب|مر[آا]ة|"
    "बा[यएई]|बाँ|दा[यएई]|दाँ|दाहि|पूर्व|पश्चिम|घड|दर्पण",
)
_WRITING = _words(
    "read|text|writ|wrote|say|said|letter|word|number|digit|ocr|sign|document|receipt|invoice|"
    "bill|ticket|chart|graph|plot|diagram|table|caption|subtitle|title|headline|page|print|"
    r"spell|transcri|menu|book|newspaper|magazine|poster|banner|logo|brand|licen[cs]e|clock|watch\b|"
    "calendar|keyboard|screen|button|icon|web|code|formula|equation|map|price|total|cost|date|"
    "name|address|phone|email|score|"
    r"lies|les(?:en|bar)|text|schr[ie]|steht|buchst|wort|wört|zahl|ziffer|nummer|schild|dokument|"
    r"beleg|quittung|rechnung|tabelle|titel|seite|preis|summe|betrag|datum|uhr\b|bildsch|karte|"
    r"lire|lit\b|lisez|écri|lettre|mots?\b|nombre|numéro|chiffre|panneau|enseigne|reçu|facture|"
    r"tableau|titre|prix|montant|écran|affich|carte|"
    r"lee|texto|escri|dice|letra|palabra|n[úu]mero|cifra|letrero|cartel|señal|recibo|gr[áa]fic|"
    r"tabl|t[íi]tul|p[áa]gina|preci|fecha|pantalla|mapa|"
    r"legg|testo|scritt|scriv|parol|insegna|ricevut|scontrin|fattur|titol|prezz|scherm|mappa|"
    r"ler\b|leia|escrev|diz\b|palavra|placa|fatura|preço|data\b|tela\b|"
    r"чита|прочит|текст|надпис|напис|пиш|букв|слов|числ|цифр|номер|знак|вывеск|докум|чек|квитан|"
    r"сч[её]т|график|диаграм|таблиц|заголов|страниц|цен|дат|экран|карт[аеуы]\b",
    # Prices, times and quotations
    r"[$€£¥₹]|\d[.,:/]\d|[“„«「『]|\"\w[^\"]*\"(?!\s*:)|schrift|schrieb|lesen|"
    "[读讀字词詞號号牌票页頁价價寫]|[手书填]写|写[着了的道]|文[本件档]|[数數][字]|标[志题]|標[誌題]|收据|图表|圖表|表格|"
    "日期|屏幕|地[图圖]|[読書]|題名|文章|番号|看板|領収|レシート|請求|グラフ|ページ|値段|画面|テキスト|"
    "ラベル|ロゴ|メニュー|읽|텍스트|글|쓰여|적[혀힌]|문자|단어|숫자|번호|표지|간판|문서|영수증|송장|차트|"
    "그래프|제목|페이지|가격|날짜|화면|지도|"
    "قر[أا]|نص|كتب|كتاب|مكتوب|حرف|كلم|رقم|[أا]رقام|عدد|لافتة|وثيق|مستند|[إا]يصال|فاتورة|جدول|"
    "عنوان|صفح|سعر|تاريخ|شاش|خريط|"
    "पढ|पाठ|लिख|अक्षर|शब्द|संख्या|अंक|नंबर|साइन|बोर्ड|दस्ताव|रसीद|बिल(?!्)|चार्ट|तालिका|शीर्षक|पृष्ठ|"
    "मूल्य|कीमत|तारीख|स्क्रीन|नक्श",
)


def find_place(texts: Iterable[str]) -> str | None:
    """Find coordinates that are written in a text."""
    return _find("coordinates", _PLACES, texts)


def find_sides(texts: Iterable[str]) -> str | None:
    """Find a word that a flip would make wrong: of direction, or of writing in the image."""
    texts = [*texts]
    return _find("direction", _DIRECTIONS, texts) or _find("writing", _WRITING, texts)


def _find(what: str, pattern: re.Pattern[str], texts: Iterable[str]) -> str | None:
    """What a text speaks of, with the words that say so."""
    for text in texts:
        if found := pattern.search(unicodedata.normalize("NFC", text)):
            return f"{what}, {found[0]!r}"
    return None
