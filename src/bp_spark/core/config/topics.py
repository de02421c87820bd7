"""Settings of topics: what users ask about."""

from __future__ import annotations

from pydantic import Field, field_validator

from bp_spark.core.config.base import Section

_TOPICS: dict[str, tuple[str, ...]] = {
    "delivery": (
        "where is my parcel, it has not arrived",
        "when will my order be delivered or shipped",
        *("快递", "物流", "发货", "没收到", "还没到", "包裹"),
    ),
    "return": (
        "i want to return this and get my money back",
        "refund, exchange or cancellation of my order",
        *("退货", "退款", "换货", "换一个", "取消订单"),
    ),
    "quality": (
        "the product is broken or does not work",
        "poor quality, a defective or damaged item",
        *("坏了", "坏的", "质量", "瑕疵", "破损"),
    ),
    "payment": (
        "my payment failed or i was charged twice",
        "invoice, bill, card declined, instalments",
        *("付款", "支付", "发票", "扣款", "分期"),
    ),
    "price": (
        "do you have a discount, a coupon or a voucher",
        "it was cheaper before, price match, next sale",
        *("优惠", "打折", "降价", "便宜", "价格"),
    ),
    "product": (
        "which product suits me, what size should i take, does it fit",
        "what are the features of this item, is it waterproof, which one is better",
        *("尺码", "型号", "适合", "哪个好", "怎么用"),
    ),
    "availability": (
        "is this in stock, when is it available again",
        "the item is sold out",
        *("有货", "缺货", "补货", "断货"),
    ),
    "account": (
        "i can't log in, reset my password",
        "change my address or delete my account",
        *("登录", "密码", "账号", "改地址", "注销"),
    ),
}


class TopicsConfig(Section):
    """What consultations are about (``consultation_topics``); see docs/profiles.md."""

    phrases: dict[str, tuple[str, ...]] = Field(
        _TOPICS,
        description="Topic -> phrases. A text is about the topic whose phrase it contains or, by the language model of "
        "`texts.model`, comes nearest to. Write them in your users' languages. Your phrases replace the whole default list. "
        "Empty: no topics.",
    )
    least_similarity: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Cosine between a text and a phrase below which the text is about none of the topics.",
    )
    max_tokens: int = Field(128, gt=0, description="Tokens of a text that the model reads. The rest is cut off.")

    @field_validator("phrases")
    @classmethod
    def _phrases_have_words(cls, phrases: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for topic, of_topic in phrases.items():
            if not of_topic or not all(any(map(str.isalnum, phrase)) for phrase in of_topic):
                raise ValueError(f"{topic} must have phrases, each with a letter or a digit")
        return phrases
