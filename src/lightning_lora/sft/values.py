"""Values that a message names and the answer copies: sites, contacts, serials, and the words around them."""

from __future__ import annotations

import random
import zlib

from lightning_lora.sft.pools import pool

SITES = pool(
    """Leeds|Bremen|Lyon|Porto|Gdansk|Malmo|Turin|Ghent|Aarhus|Bilbao|Cork|Dresden|Exeter|Florence|Graz|
    Hamburg|Istanbul|Jena|Kiel|Linz|Madrid|Naples|Oslo|Prague|Rotterdam|Seville|Tampere|Utrecht|Vienna|Warsaw|
    York|Zurich|Boston|Chicago|Dallas|Houston|Denver|Memphis|Portland|Seattle|Toronto|Calgary|Austin|Newport|
    Preston|Carlisle|Swansea|Derby|Dublin|Geneva|Munich|Nantes|Kingsford|Westbrook|Ashton|Millfield|
    Harbour Lane|Green Hill|North Quay|Park Road|Old Mill|Stone Bridge|Long Reach|East Dock|Aberdeen|Ankara|
    Athens|Augusta|Avignon|Baltimore|Barcelona|Belfast|Bergen|Bologna|Bordeaux|Brno|Bruges|Brussels|Bucharest|
    Budapest|Cadiz|Cambridge|Cardiff|Catania|Chester|Cleveland|Copenhagen|Cordoba|Coventry|Delft|Detroit|Dijon|
    Dover|Dundee|Eindhoven|Erfurt|Faro|Fresno|Galway|Genoa|Gothenburg|Granada|Grenoble|Halifax|Hanover|Ipswich|
    Kassel|Lancaster|Lausanne|Leicester|Leipzig|Liverpool|Lodz|Lucerne|Mainz|Malaga|Marseille|Modena|Montreal|
    Murcia|Nashville|Omaha|Orlando|Ottawa|Padua|Palermo|Parma|Perth|Pisa|Plymouth|Poznan|Quebec|Rennes|Reno|Riga|
    Salzburg|Santander|Sheffield|Siena|Stockholm|Strasbourg|Tampa|Toledo|Toulouse|Trieste|Tucson|Turku|Ulm|
    Uppsala|Venice|Verona|Vigo|Wroclaw|Zagreb|Canal Street|Iron Gate|Maple Court|Castle Park|Broad Lane|
    Silver Creek|Lower Field|Chapel Row|Red Barn|Union Yard|Albany|Almeria|Amiens|Arezzo|Bath|Bergamo|Boise|Bonn|
    Brescia|Brighton|Burgos|Caen|Canberra|Chemnitz|Como|Cremona|Darwin|Dayton|Dortmund|Duisburg|Durban|Edmonton|
    El Paso|Ferrara|Flint|Freiburg|Fulda|Gera|Girona|Goslar|Hamilton|Hartford|Huelva|Hull|Innsbruck|Izmir|Jaen|
    Katowice|Kaunas|Kosice|Lahti|Leiden|Lille|Limerick|Limoges|Ljubljana|Lublin|Lugano|Luton|Macon|Mannheim|
    Maribor|Metz|Mobile|Monza|Nancy|Nijmegen|Nuremberg|Orebro|Ostrava|Oulu|Oviedo|Patras|Pecs|Pilsen|Pula|Raleigh|
    Reading|Regina|Rimini|Rostock|Rouen|Sacramento|Sarajevo|Sibiu|Sofia|Split|Stavanger|Szeged|Tarragona|Tilburg|
    Torquay|Tours|Trento|Tromso|Udine|Varna|Venlo|Wichita|Wolfsburg|Worcester|Yeovil|Zadar|Zwolle|Ashbury|
    Birchcombe|Claydale|Dunholm|Elmstead|Farleigh|Glenmere|Hazelwick|Kirkness|Langport|Marlow Heath|Norbury|
    Oakley Cross|Pemworth|Quarrington|Rockport|Sandwell|Thornby|Underhill|Walford|Amber Road|Bell Tower|
    Copper Street|Dyer Lane|Elm Terrace|Fox Hollow|Gate House|Hill Farm|King Street|Lime Works|Meadow End|
    New Wharf|Orchard Way|Pine Ridge|Queens Dock|Rail Yard|Salt Works|Tower Park|Upper Ford|Vine Cottage|
    White Cliff|South Gate|West Field|Mill Lane|High Street""",
    "Basel|Tallinn|Odense|Norwich|Phoenix|Bern|River Gate|Lakeview",
    """Antwerp|Bristol|Cologne|Durham|Essen|Frankfurt|Glasgow|Helsinki|Krakow|Lisbon|Milan|Oxford|Stuttgart|
    Tulsa|Valencia|Winnipeg|Brookside|Fairview|South Pier|Mill Road|High Bridge|West Dock|Alicante|Angers|Arnhem|
    Augsburg|Bochum|Coimbra|Debrecen|Gdynia|Grimsby|Haarlem|Lecce|Maastricht|Nottingham|Orleans|Pamplona|Perugia|
    Plovdiv|Ravenna|Regensburg|Salford|Southport|Szczecin|Timisoara|Trondheim|Wuppertal|Zaragoza|Abbey Court|
    Forge Lane|Granary Row|Station Road""",
)

# Small places, put together from two parts: so many that a model can only copy them.
_PLACE_STARTS = pool(
    """Alder|Apple|Barn|Bex|Black|Bram|Brack|Burn|Cald|Chal|Clif|Cole|Corn|Cran|Crow|Dal|Dray|Dun|Eagle|Ever|Fal|
    Fern|Fin|Gar|Glen|Gold|Grim|Had|Hart|Hol|Horn|Ing|Jar|Kel|Kil|Kings|Lam|Lark|Lin|Lock|Maple|Mar|Mere|Mor|Nor|
    Oak|Otter|Pen|Plum|Quar|Raven|Red|Rush|Sand|Sel|Shel|Silver|Stan|Sten|Swan|Tad|Thorn|Tor|Ul|Vel|Wal|War|Wend|
    Whit|Win|Wood|Wyn|Yarn|Zeal""",
    "Bel|Cam|Hazel|Pol",
    "Ald|Bar|Chester|Elm|Far|Green|Hay|Long|Mill|North|Pem|Rose|Stone|West",
)
_PLACE_ENDS = pool(
    """bank|beck|borough|bourne|bridge|brook|bury|by|cliffe|combe|cote|cott|croft|dale|den|down|ey|fell|field|gate|
    ham|hampton|hill|holme|hurst|ing|land|leigh|ley|low|mere|minster|moor|mouth|port|ridge|sea|shaw|stead|stoke|
    stone|thorpe|ton|well|wick|wold|worth|wright""",
    "haven|mead|stow",
    "ford|cross|don|grove|hall|path|side|view|water|wood",
)

FIRST_NAMES = pool(
    """Maria|Tom|Aisha|Peter|Lena|Carlos|Julia|Omar|Nina|Paul|Grace|Ivan|Emma|Hugo|Sara|David|Laura|Ahmed|
    Rosa|Simon|Clara|Victor|Alice|Marco|Helen|Felix|Irene|Daniel|Olga|Martin|Sofia|Robert|Eva|Jonas|Ruth|Adam|
    Diana|Oscar|Vera|Leo|Amelia|Boris|Celia|Derek|Elena|Fiona|Gustav|Hanna|Igor|Jasmin|Karim|Lydia|Mateo|
    Noah|Oliver|Pilar|Quentin|Renata|Stella|Tariq|Ursula|Vincent|Wanda|Xavier|Yusuf|Zoe|Agnes|Bernd|Chloe|
    Dmitri|Esther|Fatima|Gloria|Hassan|Ingrid|Judith|Kurt|Louis|Mehmet|Natalia|Aaron|Bettina|Cedric|Dora|Edgar|
    Florian|Gemma|Harold|Isabel|Jerome|Katrin|Lars|Miriam|Nils|Otto|Priya|Rafael|Sandra|Theo|Ulrike|Valerie|Walter|
    Yvonne|Albert|Beatrice|Conrad|Doris|Emil|Freya|Gerda|Hilda|Ismail|Joseph|Karla|Leon|Matilda|Nora|Owen|Patrick|
    Rachel|Selma|Timo|Viola|Wendy|Alan|Bridget|Claude|Dominic|Erika|Fabian""",
    "Kate|Bruno|Petra|Samir|Joan|Erik",
    """Anna|George|Monica|Stefan|Linda|Pablo|Susan|Jacob|Teresa|Kevin|Marta|Frank|Nadia|Henry|Paula|Lucas|Brian|
    Camille|Dennis|Elsa|Fernando|Hannah|Ian|Jana|Kenneth|Lucia|Michael|Nicole|Philip|Rita|Sven|Tina""",
)

LAST_NAMES = pool(
    """Olsen|Smith|Khan|Novak|Weber|Lopez|Brown|Rossi|Jensen|Dubois|Wright|Petrov|Murphy|Garcia|Fischer|
    Taylor|Costa|Lindberg|Hughes|Kowalski|Meyer|Santos|Walker|Hansen|Moreau|Cooper|Ricci|Larsen|Adams|Schmidt|
    Bennett|Vidal|Nowak|Turner|Bauer|Silva|Morgan|Keller|Ramos|Fox|Abbott|Baker|Carter|Dalton|Eriksen|
    Foster|Greco|Harris|Ibrahim|Jacobs|Kaminski|Laurent|Mancini|Neumann|Ortega|Palmer|Quinn|Richter|Sanders|
    Tanaka|Ullmann|Vogel|Watson|Yilmaz|Zimmer|Andersson|Barbieri|Castillo|Dietrich|Egger|Fontaine|Gruber|
    Haddad|Ivanov|Jankowski|Klein|Lefevre|Marino|Nguyen|Osborne|Peeters|Roberts|Schneider|Thomas|Vargas|Allen|
    Becker|Caruso|Delgado|Engel|Fuchs|Gomez|Hartmann|Iversen|Janssen|Kruger|Lambert|Martinez|Nielsen|Olivier|Pavlov|
    Ramsey|Sorensen|Talbot|Urban|Visser|Wolf|Zapata|Ackermann|Blanc|Cruz|Drake|Esposito|Fletcher|Gallo|Herrera|Hunter|
    Jovanovic|Kaiser|Lang|Medina|Norris|Oliveira|Pereira|Ritter|Steiner|Thompson|Vasquez|Winter|Zeller|Ali|Bergman|
    Chapman|Diaz|Ellis|Ferreira|Gibson|Holm|Jung|Koch|Lund|Marsh|Nagy|Otto|Popov|Rasmussen|Shaw""",
    "Stone|Horak|Leroy|Nilsen|Price|Conti",
    """Berg|Clark|Romano|Evans|Hoffman|Torres|Young|Marchetti|Virtanen|Collins|Ferrari|Parker|Wagner|Reed|
    Mendez|Bishop|Albers|Barnes|Cortez|Dumont|Eklund|Franke|Graham|Hill|Ito|Jansson|Kovacs|Lewis|Mueller|Navarro|
    Pohl|Russo""",
)

SERIAL_PREFIXES = ("KX", "TV", "RM", "BD")

UNIT_WORDINGS = pool(
    "serial {u}|unit {u}|no. {u}|it is {u}|tag {u}|machine id {u}|({u})|type plate {u}|ref {u}|asset {u}",
    "plate reads {u}",
    "serial number {u}|unit number {u}|the tag says {u}|asset no. {u}",
)

SITE_WORDINGS = pool(
    """at our {s} site|in {s}|here in {s}|at the {s} plant|location: {s}|at {s}|in the {s} hall|
    for the {s} branch|{s} depot""",
    "over in {s}",
    "in our {s} plant|site: {s}|at our {s} branch|at the {s} depot",
)

CONTACT_WORDINGS = pool(
    """regards, {c}|ask for {c}|the contact is {c}|{c} here|thanks, {c}|please call {c}|best, {c}|
    my name is {c}|yours, {c}|contact {c} on site|- {c}|{c} will let you in""",
    "sincerely, {c}",
    "kind regards, {c}|please ask for {c}|many thanks, {c}|this is {c}|your contact is {c}",
)

GREETINGS = pool(
    "hello|hi|hi team|good morning|dear sirs|hey|dear service team|good afternoon|to whom it may concern",
    "good day",
    "hello all|dear support|good evening|hi there",
)

SIGN_OFFS = pool(
    "thanks|regards|cheers|thank you|best|the night shift|the workshop team|sent from my phone",
    "thx",
    "many thanks|kind regards|the day shift|sent from my mobile",
)

ASIDES = pool(
    """we bought it in spring|it ran fine all of last year|the same happened in March|
    your colleague was here two weeks ago|we already checked the fuse|the manual did not help|
    it is about 6 years old|we are open from 7 to 16|it has run 4200 hours|the door code is at reception|
    photos will follow|this is the second time|my colleague mentioned it on the phone""",
    "we tried a restart",
    """it was installed in autumn|nobody has touched it since|it is the third time this year|
    the guard will open the gate|we have had it for 8 years|I have attached a picture""",
)


def site(rng: random.Random, split: str) -> str:
    """Draw the name of a place of the split: one known from a map, or a made-up one."""
    if rng.random() < 0.5:
        return rng.choice(SITES.of(split))
    return rng.choice(_PLACE_STARTS.of(split)) + rng.choice(_PLACE_ENDS.of(split))


def person(rng: random.Random, split: str) -> str:
    """Draw a first and a last name of the split."""
    return f"{rng.choice(FIRST_NAMES.of(split))} {rng.choice(LAST_NAMES.of(split))}"


def serial(rng: random.Random, split: str) -> str:
    """Draw a serial such as ``KX-4821``; a checksum gives each serial to exactly one split."""
    while True:
        candidate = f"{rng.choice(SERIAL_PREFIXES)}-{rng.randrange(1000, 10000)}"
        if serial_split(candidate) == split:
            return candidate


def serial_split(serial_number: str) -> str:
    """Return the split that owns a serial."""
    return ("train", "train", "train", "validation", "test")[zlib.crc32(serial_number.encode()) % 5]
