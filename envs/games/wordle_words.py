"""The secret words of the Wordle-like game: common English words of five letters."""

_TEXT = """
about above actor acute admit adopt adult after again agent agree ahead alarm album alert alike
alive allow alone along alter among anger angle angry apart apple apply arena argue arise array
aside asset avoid award aware badly baker basic basis beach began begin being below bench birth
black blame blind block blood board boost bound brain brand bread break breed brief bring broad
broke brown build built buyer cable carry catch cause chain chair chart chase cheap check chest
chief child civil claim class clean clear click clock close coach coast count court cover craft
crash cream crime cross crowd crown curve cycle daily dance death depth doubt draft drama dream
dress drink drive earth eight elite empty enemy enjoy enter entry equal error event every exact
exist extra faith false fault fiber field fifth fifty fight final first flash fleet floor fluid
focus force forth forty forum found frame fresh front fruit funny giant glass globe going grace
grade grand grant grass great green gross group grown guard guess guest guide happy heart heavy
horse hotel house human ideal image index inner input issue joint judge known label large laser
later laugh layer learn least leave legal level light limit local logic loose lower lucky lunch
magic major maker march match mayor meant media metal might minor mixed model money month moral
motor mount mouse mouth movie music needs never newly night noise north noted novel nurse occur
ocean offer often order other ought paint panel paper party peace phase phone photo piece pilot
pitch place plain plane plant plate point pound power press price pride prime print prior prize
proof proud prove queen quick quiet quite radio raise range rapid ratio reach ready refer right
river rough round route royal rural scale scene scope score sense serve seven shall shape share
sharp sheet shelf shell shift shock shoot short shown sight since skill sleep slide small smart
smile smoke solid solve sorry sound south space spare speak speed spend split sport staff stage
stand start state steam steel stick still stock stone store storm story strip stuck study stuff
style sugar suite super sweet table taken taste teach thank their theme there thick thing think
third those three throw tight times title today topic total touch tough tower track trade train
treat trend trial truck truly trust truth twice under union unity until upper urban usage usual
valid value video visit vital voice waste watch water wheel where which while white whole whose
woman world worry worth would wound write wrong young
"""
WORDS = tuple(_TEXT.split())
