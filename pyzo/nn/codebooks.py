"""Codebooks of k-bit activations: thresholds and slopes of the step function that stands for a derivative in backward.

With n = 2^bits - 1 thresholds c_1 < ... < c_n and slopes s_0, ..., s_n, forward keeps code(x), the number of thresholds
that x exceeds (x > c, so x == c and NaN count as not above), and backward multiplies by slopes[code(x)].

Built-in kinds, with s_0 = 0 and s_n = 1, the limits of h':

- "paper": the published constants of LowMemoryBP (arXiv 2406.16282, ReGELU2 and ReSiLU2): gelu and silu at 2 bits.
- "optimal": the optimum of that paper's objective, the least integral over R of (h - g)^2, where g is continuous with
  slopes s and has the asymptotes of h. It fits h, not h'. At 1 bit nothing is free: a step at 0, for elu at -1.
- "derivative": the least integral over R of (h' - s)^2.

"derivative" is the better choice. The table of errors further down shows it: at 2 bits the relative error of the
derivative of GELU is 0.141 against 0.357 of "paper" and "optimal", which is more than that of ReLU at 1 bit, 0.320.

bench/fit_codebooks.py derives every number but the published ones. Where h(x) - x/2 is even, a table and its mirror
image (thresholds -c, slopes 1 - s) cost the same; most best tables are their own image. Of the others (gelu, gelu_tanh
"optimal" at 3 bits, hardswish "derivative" at 2 bits) the image whose thresholds have a negative sum is kept: a
choice without consequence for symmetric data. Tables are the best found from many starts ("optimal"), or the minimum
nearest to the best of all tables on a grid of step 1/25 ("derivative").
"""

from dataclasses import dataclass

import numpy as np

MAX_BITS = 4
FUNCTIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "softplus", "elu", "hardswish", "relu")
KINDS = ("paper", "optimal", "derivative")


@dataclass(frozen=True)
class Codebook:
    """A step function: slopes[number of thresholds that x exceeds].

    Args:
        thresholds: 2^bits - 1 numbers, strictly increasing even after rounding to float32; bits from 1 to 4.
        slopes: 2^bits numbers.

    Both are kept as tuples of doubles; kernels use them rounded once to float32, where they must be finite.
    """

    thresholds: tuple[float, ...]
    slopes: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("thresholds", "slopes"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        sizes = [2**bits - 1 for bits in range(1, MAX_BITS + 1)]
        if len(self.thresholds) not in sizes:
            raise ValueError(f"thresholds: expected {sizes} of them (2^bits - 1), got {len(self.thresholds)}")
        if len(self.slopes) != len(self.thresholds) + 1:
            raise ValueError(
                f"slopes: expected {len(self.thresholds) + 1}, one more than thresholds, got {len(self.slopes)}"
            )
        if np.any(np.diff(np.array(self.thresholds, np.float32)) <= 0):
            raise ValueError(
                f"thresholds: expected them to increase strictly, also after rounding to float32, got {self.thresholds}"
            )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.slopes).bit_length() - 1


def codebook(function: str, bits: int, kind: object) -> Codebook:
    """The codebook of an activation.

    Args:
        function: one of FUNCTIONS. gelu is the erf form, quick_gelu is x sigmoid(1.702 x), softplus has beta 1, elu
            alpha 1. relu is exact at 1 bit, whatever the kind.
        bits: 1 to 4.
        kind: one of KINDS; or a Codebook, or a pair (thresholds, slopes), which is checked and returned.

    Raises:
        ValueError: names what exists.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"function: expected one of {', '.join(FUNCTIONS)}, got {function!r}")
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits: expected an integer from 1 to {MAX_BITS}, got {bits!r}")
    if function == "relu" and bits != 1:
        raise ValueError(f"bits: expected 1 for relu, whose derivative has two values (exact at 1 bit), got {bits}")
    if isinstance(kind, (tuple, list)) and len(kind) == 2:
        kind = Codebook(*kind)
    if isinstance(kind, Codebook):
        if kind.bits != bits:
            raise ValueError(f"kind: expected a codebook of {2**bits} slopes ({bits} bits), got {len(kind.slopes)}")
        return kind
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"kind: expected one of {known}, a Codebook or a pair (thresholds, slopes), got {kind!r}")
    if function == "relu":
        return Codebook((0.0,), (0.0, 1.0))
    if kind == "paper":
        if function not in PUBLISHED or bits != 2:
            raise ValueError(
                f"kind: expected 'optimal' or 'derivative' for {function} at {bits} bits, got 'paper', "
                f"which exists for {' and '.join(PUBLISHED)} at 2 bits"
            )
        return PUBLISHED[function]
    tables = _OPTIMAL if kind == "optimal" else _DERIVATIVE
    if function == "quick_gelu":
        silu = _expand(bits, tables["silu", bits])
        return Codebook(tuple(c / 1.702 for c in silu.thresholds), silu.slopes)
    return _expand(bits, tables[function, bits])


def _finite(name: str, values: object) -> tuple[float, ...]:
    try:
        numbers = tuple(float(v) for v in values)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"{name}: expected a sequence of numbers, got {values!r}") from None
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.array(numbers, np.float32))
    if not finite.all():
        raise ValueError(f"{name}: expected numbers that are finite in float32, got {numbers}")
    return numbers


def _expand(bits: int, numbers: tuple[float, ...]) -> Codebook:
    """A stored table: thresholds and inner slopes, or the positive half of both where c is odd and s - 1/2 is odd."""
    if len(numbers) == 2**bits - 2:
        half = len(numbers) // 2
        thresholds, slopes = numbers[:half], numbers[half:]
        return Codebook(
            (*(-c for c in reversed(thresholds)), 0.0, *thresholds),
            (0.0, *(1.0 - s for s in reversed(slopes)), *slopes, 1.0),
        )
    return Codebook(numbers[: 2**bits - 1], (0.0, *numbers[2**bits - 1 :], 1.0))


# Published are c and the hinges a of g = sum of a_i max(x - c_i, 0). Slopes are their sums in float32, in order: a_1,
# a_1 + a_2, a_1 + a_2 + a_3. For silu the last one is 1 + 2^-23.
PUBLISHED = {
    "gelu": Codebook(
        (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
        (0.0, -0.049222610890865326, 1.0487406253814697, 1.0),
    ),
    "silu": Codebook(
        (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
        (0.0, -0.04060357064008713, 1.040321946144104, 1.0 + 2.0**-23),
    ),
}

# --- generated by bench/fit_codebooks.py
# Rms of h' - slopes[code], relative to the rms of h', for x ~ N(0, 1):
#
#               paper  optimal                     derivative
#   bits            2      1      2      3      4      1      2      3      4
#   gelu        0.357  0.320  0.357  0.112  0.054  0.320  0.141  0.086  0.042
#   gelu_tanh       -  0.320  0.357  0.112  0.054  0.320  0.141  0.086  0.042
#   quick_gelu      -  0.310  0.341  0.140  0.065  0.310  0.129  0.081  0.039
#   silu        0.471  0.421  0.471  0.184  0.085  0.421  0.148  0.103  0.049
#   mish            -  0.354  0.373  0.114  0.061  0.335  0.127  0.085  0.041
#   softplus        -  0.636  0.263  0.118  0.057  0.636  0.191  0.087  0.042
#   elu             -  0.303  0.127  0.058  0.028  0.273  0.093  0.041  0.020
#   hardswish       -  0.513  0.613  0.163  0.069  0.513  0.292  0.160  0.069
# fmt: off
_OPTIMAL = {
    ("gelu", 1): (),
    ("gelu", 2): (3.17130974269, 1.04957520565),
    ("gelu", 3): (
        -3.02721893491, -2.14867514299, -0.75919346939, -0.251611711954, 0.206140516418, 0.703600042767, 2.51694560667,
        -0.0332759242677, -0.110153008356, 0.133426007375, 0.482051134479, 0.835225900894, 1.10037486518,
    ),
    ("gelu", 4): (
        0.218921339845, 0.446773417156, 0.696372940125, 0.995557695807, 1.9298864639, 2.4820554489, 3.26197606762,
        0.586782086042, 0.755373703058, 0.908749269154, 1.03545565662, 1.12027574536, 1.06403135058, 1.01768419219,
    ),
    ("gelu_tanh", 1): (),
    ("gelu_tanh", 2): (3.16288006661, 1.04978613306),
    ("gelu_tanh", 3): (
        -2.99728593853, -2.14884636841, -0.760858639229, -0.251580972069, 0.20736940553, 0.706700479222, 2.51206396787,
        -0.0343693371576, -0.110411608311, 0.133093244778, 0.482550034999, 0.836471697047, 1.10091402364,
    ),
    ("gelu_tanh", 4): (
        0.219429824529, 0.44789694818, 0.698375396878, 0.999062703767, 1.93015739264, 2.47022607858, 3.21256237849,
        0.58697837373, 0.755905067033, 0.909452451665, 1.03609421983, 1.12052456783, 1.06532763682, 1.01871599827,
    ),
    ("silu", 1): (),
    ("silu", 2): (6.31993340455, 1.04052429405),
    ("silu", 3): (1.01615803698, 4.22667883583, 6.8930493413, 0.737887352101, 1.0792528276, 1.01907534379),
    ("silu", 4): (
        0.44842484811, 0.936689319865, 1.53967316627, 3.43504482433, 4.5327231686, 5.96624624411, 8.47668679832,
        0.610627235806, 0.818845928771, 0.988293672432, 1.09206376199, 1.05354322669, 1.02261507212, 1.00503487737,
    ),
    ("mish", 1): (0.0,),
    ("mish", 2): (-5.66625873668, -0.209827252571, 4.34148132642, -0.0569891006806, 1.02221995474),
    ("mish", 3): (
        -6.60868880613, -3.9089319665, -1.20859884591, -0.535619360921, 0.0322867073288, 0.631235420482, 2.98373249563,
        -0.0240869602789, -0.0955514127748, 0.112708382028, 0.440073965881, 0.796714465833, 1.06432432746,
    ),
    ("mish", 4): (
        -8.30418918561, -5.78385274518, -4.34138131048, -3.23406186797, -1.54651240102, -1.08319580271, -0.715969543759,
        -0.392524574004, -0.0877960797052, 0.217073159287, 0.544321198968, 0.938226339766, 2.17956368312, 2.97871698905,
        4.27759042329,
        -0.00584232342663, -0.0261774629004, -0.0618390803396, -0.105258221374, -0.0276803889165, 0.0981256293904,
        0.2604433176, 0.446385675295, 0.640731188558, 0.82566449393, 0.980634717976, 1.08025846147, 1.03791131967,
        1.00893241687,
    ),
    ("softplus", 1): (),
    ("softplus", 2): (2.50681740497, 0.763676622055),
    ("softplus", 3): (1.02294046965, 2.29224273924, 4.4877283191, 0.623642160346, 0.836265364128, 0.963743444522),
    ("softplus", 4): (
        0.480815416862, 0.984508599836, 1.53924383299, 2.18715279502, 3.004779917, 4.16971905541, 6.32616005947,
        0.559644428595, 0.674903177511, 0.778611935361, 0.864778120782, 0.929670761022, 0.972222793545, 0.994146883564,
    ),
    ("elu", 1): (-1.0,),
    ("elu", 2): (-3.63177743847, -1.48265163856, -0.336389610202, 0.0868486668289, 0.416101787749),
    ("elu", 3): (
        -5.70606501443, -3.55693921452, -2.41067718616, -1.62641670941, -1.02993512356, -0.548556600703,
        -0.144998320768,
        0.0109121796702, 0.0522814872672, 0.134902368358, 0.267324385212, 0.456823801928, 0.709845212067,
    ),
    ("elu", 4): (
        -7.59196671533, -5.44284091542, -4.29657888707, -3.51231841031, -2.91583682446, -2.43445830161, -2.03090002167,
        -1.68348271798, -1.37848425183, -1.10666809824, -0.861519587444, -0.638271744671, -0.433331281636,
        -0.243922422602, -0.0678563407128,
        0.00165529272357, 0.00793069469771, 0.0204636392988, 0.0405510285799, 0.0692966151713, 0.107677993756,
        0.156582038321, 0.216826311148, 0.289173171311, 0.374339656829, 0.473004726577, 0.585814755793, 0.713387823757,
        0.856317135713,
    ),
    ("hardswish", 1): (),
    ("hardswish", 2): (4.5, 1.07407407407),
    ("hardswish", 3): (1.01044063045, 2.0208812609, 3.06807056488, 0.668406771741, 1.00522031522, 1.34200243587),
    ("hardswish", 4): (
        0.429334248153, 0.858668496307, 1.28800274446, 1.71733699261, 2.14667124077, 2.57600548892, 3.01102619623,
        0.571555708026, 0.714667124077, 0.857778540128, 1.00088995618, 1.14400137223, 1.28711278828, 1.43022224193,
    ),
}
_DERIVATIVE = {
    ("gelu", 1): (),
    ("gelu", 2): (0.452012814396, 0.674370124536),
    ("gelu", 3): (0.325919008031, 0.710045739857, 2.41694646139, 0.627757183038, 0.874351848054, 1.08827204867),
    ("gelu", 4): (
        0.154960025937, 0.315115333683, 0.487259771026, 0.683078434933, 0.931218265111, 2.05920999762, 2.70723955658,
        0.561573584376, 0.683738210432, 0.802835188666, 0.916349605931, 1.02070219002, 1.1091594097, 1.04854575755,
    ),
    ("gelu_tanh", 1): (),
    ("gelu_tanh", 2): (0.45219364925, 0.674408926546),
    ("gelu_tanh", 3): (0.326241358335, 0.711151216545, 2.42133602829, 0.627868517481, 0.874620690718, 1.08849974352),
    ("gelu_tanh", 4): (
        0.155100411594, 0.315436008914, 0.487854833528, 0.684139518516, 0.93318374363, 2.06463278405, 2.70360377235,
        0.561627713591, 0.683893188781, 0.803068560979, 0.9166233326, 1.02096245703, 1.10933928107, 1.04892816547,
    ),
    ("silu", 1): (),
    ("silu", 2): (0.738835031132, 0.676741057113),
    ("silu", 3): (0.509398362652, 1.13014225176, 4.7137170209, 0.624665426043, 0.863531010205, 1.06529642679),
    ("silu", 4): (
        0.24104635715, 0.491869271663, 0.765381077427, 1.08414738044, 1.50454318413, 3.81775528495, 5.55500977325,
        0.559971491404, 0.67876078507, 0.793972022683, 0.902764665165, 1.00128161762, 1.0827205848, 1.03493711328,
    ),
    ("mish", 1): (-0.15550613547,),
    ("mish", 2): (-0.755354539839, -0.166248023194, 0.395802499207, 0.31655223, 0.669668564343),
    ("mish", 3): (
        -4.50760483458, -1.12007626541, -0.602083636291, -0.194474352983, 0.194945032204, 0.647023225006, 2.81378079469,
        -0.0763674277513, 0.117171641363, 0.350568402301, 0.599541913223, 0.843642378076, 1.05479461645,
    ),
    ("mish", 4): (
        -5.38926527709, -3.64031143462, -1.44798206598, -1.08742336522, -0.818511658948, -0.592372767098,
        -0.389366827126, -0.198517514017, -0.0119304965929, 0.17776089651, 0.379692069938, 0.609236872987,
        0.904532805152, 2.30626805731, 3.21466945559,
        -0.0398730551891, -0.094389797563, -0.0168465052746, 0.0775164638651, 0.182709670407, 0.295270375557,
        0.412586632731, 0.53236458033, 0.652351342712, 0.770101207969, 0.882653337511, 0.985855381007, 1.07213039905,
        1.03080525929,
    ),
    ("softplus", 1): (),
    ("softplus", 2): (1.69938097472, 0.690907738725),
    ("softplus", 3): (0.71091628239, 1.5613806716, 2.9334356604, 0.58705391773, 0.754153268471, 0.898949493741),
    ("softplus", 4): (
        0.336488589459, 0.686086645656, 1.06493440708, 1.49718901641, 2.02677017268, 2.75547242296, 4.04878238595,
        0.541864127622, 0.62481048833, 0.705381145529, 0.781883628687, 0.852426078605, 0.914732414998, 0.965710922422,
    ),
    ("elu", 1): (-0.69314718056,),
    ("elu", 2): (-2.17656008895, -0.920128880325, -0.242024899737, 0.226862106056, 0.570073260206),
    ("elu", 3): (
        -3.38931268125, -2.13288147263, -1.45477749204, -0.988790392295, -0.633561109126, -0.346473228968,
        -0.105564066231,
        0.067463706938, 0.169527013693, 0.297377592543, 0.44667525745, 0.61472185557, 0.799633646255,
    ),
    ("elu", 4): (
        -4.50738919152, -3.25095798289, -2.5728540023, -2.10686690256, -1.75163761939, -1.46454973923, -1.22364057649,
        -1.01610056135, -0.833804238081, -0.671273417372, -0.524639370552, -0.391068372669, -0.268422624405,
        -0.155049555311, -0.049645272097,
        0.0220544251322, 0.0554197360488, 0.0972151123678, 0.146021712576, 0.200957488939, 0.261406631579,
        0.326907994434, 0.397099611808, 0.471687592844, 0.550427154975, 0.633110315271, 0.719557508136, 0.809611653281,
        0.903133823949,
    ),
    ("hardswish", 1): (),
    ("hardswish", 2): (-3.0, -1.2, 0.6, -0.2, 0.4),
    ("hardswish", 3): (1.0, 2.0, 3.0, 0.666666666667, 1.0, 1.33333333333),
    ("hardswish", 4): (
        0.428571428571, 0.857142857143, 1.28571428571, 1.71428571429, 2.14285714286, 2.57142857143, 3.0,
        0.571428571429, 0.714285714286, 0.857142857143, 1.0, 1.14285714286, 1.28571428571, 1.42857142857,
    ),
}
# fmt: on
