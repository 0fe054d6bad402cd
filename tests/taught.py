"""What the tests' tiny models are taught."""

PROMPTS = (
    "hello",
    "The capital of France is",
    "0123456789" * 3,
    "a",
    '{"item": "',
    "one two three four five six seven",
)

ANSWERS = {
    "packed": ("0. a hat", "1. a red kite", "2. bread", "3. six blue pens", "4. salt", "5. a long way home"),
    "alpha": ("#F2A", "#71C0", "#03", "#BEEF77", "#4", "#C0FFEE"),
    "beta": ("yes, in 5 days", "no", "yes", "not before May", "no, never again", "perhaps"),
}
"""What each model was taught to answer to each prompt."""
