"""What the slots of the semantic-parsing task are filled with: rules in the notation of ``parse_grammar``."""

__all__ = ["RULES"]


def _words(text: str) -> list[str]:
    """Patterns from a text with one a comma."""
    return [" ".join(part.split()) for part in text.split(",")]


RULES: dict[str, list[str]] = {
    # Time.
    "TIME": [
        "(at|for|by|around) <CLOCK>",
        "(at|for|around) <CLOCK> <DAY>",
        "<DAY> at <CLOCK>",
        "(on|this|next|every) <WEEKDAY> [at <CLOCK>]",
        "<DAY>",
        "on <MONTH> <ORDINAL> [at <CLOCK>]",
        "on the <ORDINAL> of <MONTH>",
        "in <SPAN>",
        "(at|by) <CLOCK> on (<WEEKDAY>|the <ORDINAL>)",
        "(early|late|first thing) <DAY>",
        "<SPAN> from now",
    ],
    "CLOCK": [
        "<HOUR> (am|pm)",
        "<HOUR>:<MINUTE> (am|pm)",
        "<HOUR>:<MINUTE>",
        "<HOUR> o'clock",
        "half past <HOUR_WORD>",
        "(quarter|ten|twenty) (to|past) <HOUR_WORD>",
        "<HOUR_WORD> thirty",
        "<HOUR_WORD> in the (morning|evening)",
        "(noon|midnight|noon sharp)",
    ],
    "HOUR": [str(hour) for hour in range(1, 13)],
    "HOUR_WORD": _words("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"),
    "MINUTE": [f"{minute:02}" for minute in range(5, 60, 5)] + ["18", "27", "33", "42", "51", "59"],
    "DAY": _words(
        """today, tonight, tomorrow, tomorrow (morning|night|afternoon|evening), this (morning|afternoon|evening|week),
        the day after tomorrow, next (week|month|weekend), this weekend, <WEEKDAY>
        (morning|night|afternoon|evening), next <WEEKDAY>, this coming <WEEKDAY>, on <WEEKDAY>, a week from
        <WEEKDAY>, on <MONTH> <ORDINAL>"""
    ),
    "WEEKDAY": _words("monday, tuesday, wednesday, thursday, friday, saturday, sunday"),
    "MONTH": _words("january, february, march, april, may, june, july, august, september, october, november, december"),
    "ORDINAL": [
        f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}" for day in range(1, 31)
    ],
    "NUMBER": [*_words("two, three, four, five, six, seven, eight, nine, ten, a dozen"), *map(str, range(2, 60))],
    "SPAN": [
        "<NUMBER> (minutes|seconds|hours|days)",
        "<NUMBER> (minutes|mins|hours)",
        "<NUMBER> and a half (hours|minutes)",
        "<NUMBER> hours and <NUMBER> minutes",
        "<NUMBER> minutes and <NUMBER> seconds",
        "(an|half an|about an) hour",
        "an hour and <NUMBER> minutes",
        "a couple of (hours|minutes|days)",
        "a (minute|while|few minutes|quarter hour)",
    ],
    # People.
    "PERSON": [
        "<FIRST>",
        "<FIRST>",
        "<FIRST> <LAST>",
        "<FIRST> <LAST>",
        "my <KIN>",
        "my <KIN> <FIRST>",
        "(mr|mrs|ms|dr|professor|coach|aunt|uncle) <LAST>",
        "<FIRST> from (work|school|the gym|church|accounting)",
    ],
    "FIRST": _words(
        """olivia, noah, emma, liam, ava, mason, sofia, ethan, mia, lucas, amelia, henry, harper, leo, nora, jack, zoe,
        ruby, oscar, hazel, felix, ivy, simon, clara, hugo, alice, victor, elena, marco, priya, arjun, mei, hiro,
        yuki, omar, layla, fatima, ahmed, chidi, amara, kofi, ingrid, lars, anika, pavel, irina, diego, lucia,
        mateo, camila, pedro, joao, beatriz, claire, pierre, margot, stefan, greta, tariq, nadia, samir, tara,
        jenny, keith, donna, walter, gloria, brandon, kayla, derek, monica, trevor, wendy, curtis, joan, doug,
        sheila, randy, patty"""
    ),
    "LAST": _words(
        """miller, garcia, johnson, nguyen, kim, patel, rossi, schmidt, novak, larsen, murphy, kelly, santos, silva,
        okafor, mensah, tanaka, sato, chen, wang, ali, hassan, khan, singh, cohen, levy, dubois, moreau, bauer,
        weber, jansen, de vries, lindgren, virtanen, kowalski, horvath, popescu, ivanov, petrov, thompson, walker,
        hughes, bennett, foster, hayes, jenkins, porter, ramsey, sutton, whitfield, ashby, calloway, donovan,
        fairchild"""
    ),
    "KIN": _words(
        """mom, dad, mother, father, sister, brother, (older|younger|little|big) (sister|brother), wife, husband,
        grandma, grandpa, cousin, aunt, uncle, (best|old) friend, roommate, boss, landlord, neighbor, dentist,
        doctor, (piano|math|swim) teacher, lawyer, accountant, plumber, son, daughter, niece, nephew, boyfriend,
        girlfriend"""
    ),
    "GROUP": _words(
        """soccer, book club, marketing, family, hiking, chess, poker, sales, design, (fifth|third|tenth) grade, choir,
        neighborhood, carpool, finance, robotics, wedding, (friday|monday|tuesday) lunch, debate, gardening, yoga,
        trivia, drama, bowling, cycling, quilting, engineering, photography, volunteer, parents, running"""
    ),
    # Places.
    "PLACE": ["<CITY>", "<CITY>", "<CITY_FULL>", "(downtown|north|south|east|west|central) <CITY>", "<STREET>"],
    "CITY_FULL": ["<CITY> <REGION>"],
    "CITY": _words(
        """seattle, boston, denver, austin, portland, chicago, atlanta, phoenix, dallas, houston, detroit, memphis,
        nashville, tulsa, omaha, tampa, miami, orlando, raleigh, richmond, oakland, sacramento, fresno, tucson,
        boise, spokane, madison, columbus, cleveland, buffalo, albany, newark, hartford, providence, london, paris,
        berlin, madrid, rome, lisbon, vienna, prague, warsaw, budapest, athens, oslo, helsinki, dublin, zurich,
        brussels, tokyo, osaka, seoul, beijing, shanghai, mumbai, delhi, cairo, nairobi, lagos, sydney, melbourne,
        auckland, toronto, montreal, vancouver, calgary, lima, bogota, santiago, havana, green bay, salt lake city,
        santa fe, el paso, san diego, new orleans, long beach, fort worth, little rock, baton rouge, grand rapids,
        santa monica"""
    ),
    "REGION": _words(
        """california, texas, ohio, oregon, georgia, florida, new york, michigan, virginia, colorado, nevada, utah,
        arizona, maine, vermont, iowa, kansas, idaho, montana, ontario, quebec, france, germany, spain, italy, japan"""
    ),
    "STREET": ["<STREET_NAME> (street|avenue|road|boulevard|drive|lane)", "(highway|interstate|route|exit) <NUMBER>"],
    "STREET_NAME": _words(
        """main, oak, maple, cedar, pine, elm, washington, lincoln, jefferson, madison, park, lake, hill, river,
        church, spring, mill, bridge, sunset, valley, forest, highland, college, union, franklin, broad, king,
        queen, victoria, harbor, orchard, meadow, chestnut, walnut, magnolia, juniper, willow, birch,
        (second|third|fifth|ninth)"""
    ),
    "ADDRESS": ["<NUMBER><NUMBER> <STREET>", "<NUMBER> <STREET>", "the corner of <STREET> and <STREET>"],
    "POI": [
        "the <LANDMARK>",
        "<CITY> (airport|zoo|station|museum|stadium|library|harbor|university)",
        "<FIRST> 's (diner|bakery|cafe|pizza|garage|bookstore|tavern|grill)",
        "the <SHOP> on <STREET>",
        "<LAST> (park|beach|mall|plaza|hospital|elementary school|arena|bridge|tower)",
    ],
    "LANDMARK": _words(
        """(art|science|history|children's) museum, (old|new) town hall, botanical garden, convention center, aquarium,
        (main|public) library, (ice|roller) rink, ferry terminal, farmers market, observatory, (central|bus)
        station, opera house, court house, (west|east) gate, community pool, fairgrounds, lighthouse, food court,
        boat ramp"""
    ),
    "SHOP": _words(
        """(coffee|sandwich|donut|bike|barber|flower|pet|gift) shop, (gas|charging|fire|police|train) station,
        pharmacy, (grocery|hardware|shoe|toy|book|furniture) store, (thai|italian|mexican|greek|indian|vegan)
        restaurant, bakery, (car|dog) wash, dry cleaner, post office, atm, bank, parking (garage|lot), dog park,
        hotel, motel, gym, clinic, (nail|hair) salon, laundromat, movie theater, playground, brewery, ice cream
        parlor, (rest|truck) stop"""
    ),
    "AVOID": [
        "(avoiding|without|that avoids|but avoid) (tolls|highways|traffic|ferries|construction|toll roads|bridges)",
        "(avoiding|without|but avoid) <STREET>",
        "(via|through|along) <STREET>",
        "(via|through) <CITY>",
    ],
    "VEHICLE": _words(
        "car, bus, train, bike, foot, subway, ferry, taxi, tram, scooter, bicycle, (public|rapid) transit, metro, rail"
    ),
    # Things to do and to say.
    "TASK": [
        "(buy|pick up|get|order) <GOODS>",
        "(buy|get|order) <GOODS> and <GOODS>",
        "(pay|check|mail|cancel) <BILL>",
        "(clean|fix|paint|organize|check) the <ROOM>",
        "(feed|walk|wash|brush) <PET>",
        "(bake|make|cook) <DISH>",
        "(take|bring) <GOODS> to <PERSON>",
        "(pick up|drop off) <PERSON> [from (school|practice|the airport)]",
        "(return|finish|print|sign|review|submit) <PAPER>",
        "(water|trim|plant) the <PLANT>",
    ],
    "GOODS": _words(
        """milk, eggs, bread, (red|green|fresh) apples, (orange|tomato|grape) juice, (cat|dog|bird) food, coffee beans,
        batteries, (birthday|greeting) cards, (paper|bath|hand) towels, shampoo, tooth paste, (light|halogen) bulbs,
        (winter|snow) tires, concert tickets, stamps, (printer|rose) paper, diapers, a birthday cake, pain killers,
        (running|dance) shoes, sunscreen, charcoal, pasta, lemons, (maple|cough) syrup, (picture|window) frames,
        wrapping paper, vitamins, (garden|rubber) gloves, a phone charger, cereal, yogurt, onions, a new umbrella"""
    ),
    "BILL": [
        "the (electric|water|gas|phone|internet|credit card|cable|dental) bill",
        "the <PAPER_NAME>",
        "my <PAPER_NAME>",
    ],
    "PAPER": ["(the|my|our) <PAPER_NAME>"],
    "PAPER_NAME": _words(
        """tax return, (library|history|chemistry) book, book report, expense report, (rental|work) contract, mortgage,
        permission slip, (insurance|travel) form, resume, budget, gym membership, passport application, newsletter,
        (car|home) insurance, magazine subscription, voter registration, thesis, (science|art) project, lease"""
    ),
    "ROOM": _words(
        """kitchen, garage, (guest|dining|living) room, attic, basement, gutters, (kitchen|bathroom) sink, porch, oven,
        smoke detector, (front|back|screen) door, fence, furnace filter, closet, (bed|bath)room window, washing
        machine"""
    ),
    "PET": _words("the (dog|cat|horse|hamster|rabbit|goat|puppy|kittens|parrot|fish), <FIRST> 's (dog|cat|pony)"),
    "PLANT": _words(
        "roses, tomatoes, lawn, hedges, ferns, orchids, (apple|lemon|fig) tree, herb garden, tulips, cactus"
    ),
    "DISH": _words(
        """(apple|cherry|pumpkin|pecan) pie, lasagna, (banana|garlic|sourdough) bread, (chicken|lentil|onion) soup,
        rice, (oatmeal|sugar|ginger) cookies, pot roast, (boiled|poached) eggs, pizza, (potato|pasta) salad,
        brownies, waffles, (beef|veggie) stew, meat loaf, quiche, (baked|sweet) potatoes, chili, tea, noodles,
        casserole, tofu, risotto"""
    ),
    "LABEL": _words(
        """(morning|evening|early) workout, school run, (first|second|backup) wake up, medication, (dog|evening) walk,
        gym, homework, night shift, (team|staff) meeting, (piano|guitar|violin) practice, meditation, bus, prayer,
        nap, (baby|cat) feeding, bed time, yoga, church, swim class, carpool, laundry, (study|reading) break,
        stretching, (lunch|coffee) break, (monday|friday) standup, physical therapy, vitamins, snack, screen time,
        cleaning"""
    ),
    "NEWS": [
        "i (will be|am|am going to be) <STATE>",
        "i (will|can|can't|won't) <PLAN>",
        "(we|they) are <STATE>",
        "the <OCCASION> is <STATE_THING>",
        "(we need|don't forget|please bring|i bought) <GOODS>",
        "(happy|merry) (birthday|anniversary|holidays) (to you|from all of us|from <FIRST>)",
        "<FIRST> (is|will be) <STATE>",
        "let's <PLAN> <DAY>",
        "i left <GOODS> (in|near) the <ROOM>",
        "are you <STATE>",
    ],
    "STATE": _words(
        """<NUMBER> minutes late, running late, on (my|the) way, stuck (in traffic|at work|in a meeting), almost there,
        home (sick|early|already|by <CLOCK>), leaving (soon|now|at <CLOCK>), at the <SHOP>, ready to go, in <CITY>,
        waiting (outside|at the <SHOP>|by the car), out of (town|gas|milk), so (proud|tired|happy|sorry), not
        feeling well"""
    ),
    "STATE_THING": _words(
        """canceled, moved to (<WEEKDAY>|<CLOCK>), (almost|finally) over, starting (soon|at <CLOCK>), sold out, at
        <POI>, postponed [until <WEEKDAY>], on <STREET> now, going (well|great|badly), not until <CLOCK>"""
    ),
    "PLAN": _words(
        """meet at the <SHOP>, come over, bring <GOODS>, make <DISH>, be there (at|by) <CLOCK>, go to <CITY>, pick you
        up, see a movie, have (lunch|dinner|coffee) at <POI>, drive, play (tennis|chess|golf|cards), (eat|order)
        <DISH>, call you (back|later|at <CLOCK>), finish <PAPER>, take the (bus|train|kids)"""
    ),
    "MATTER": [
        "(the|our) <OCCASION>",
        "<PAPER>",
        "the <ROOM>",
        "<GOODS>",
        "(the trip|moving|driving|flying) to <CITY>",
    ],
    # Events, weather, music.
    "OCCASION": _words(
        """(birthday|surprise|retirement|holiday|pool|dinner) party, (budget|board|staff|parent teacher) meeting,
        wedding, (dentist|doctor|hair|vet) appointment, (piano|dance|guitar) (recital|lesson), (job|phone)
        interview, graduation, (soccer|baseball|hockey) (game|practice|tryouts), book fair, (garage|bake) sale,
        (cooking|pottery) class, picnic, (spelling|quilting) bee, baby shower, (science|job|art|county) fair,
        marathon, (camping|fishing|ski) trip, gala, (family|class) reunion, open house, fundraiser, (oil|tire)
        change, rehearsal, ceremony, lecture, parade"""
    ),
    "SHOW": _words(
        """[(free|outdoor|live|family)] (concerts|movies|plays|shows), (jazz|food|wine|film|beer|book|kite) festivals,
        (comedy|magic|puppet|air|dog|car|boat) shows, (art|photo) exhibits, (farmers|flea|night|holiday) markets,
        rodeos, (open mic|trivia|karaoke|salsa) nights, (charity|fun) runs, (basketball|football|hockey|tennis)
        games, fireworks, (poetry|book) readings, (craft|gem|renaissance) fairs, (yoga|dance|painting) classes,
        (night|food|ghost) tours"""
    ),
    "SKY": _words(
        """rain, snow, hail, be
        (sunny|cloudy|windy|foggy|humid|stormy|icy|chilly|freezing|clear|hot|muggy|overcast|dry),
        (drizzle|sleet|thunder|pour|freeze), get (colder|warmer|dark early|above <NUMBER> degrees|below <NUMBER>)"""
    ),
    "CLOTHES": _words(
        """(an|my|the big|a small) umbrella, (a|my) (rain|winter|heavy|light|warm|wool|leather) (coat|jacket|sweater),
        (snow|rain|hiking|rubber) boots, (a|my) (hat|scarf|cap|vest), sun (screen|glasses), (warm|thick|thin) gloves,
        (shorts|sandals|layers), (a|my) (hoodie|fleece|poncho|raincoat), long (sleeves|pants|johns)"""
    ),
    "TITLE": [
        "<ADJECTIVE> <NOUN>",
        "<ADJECTIVE> <NOUN>",
        "the <NOUN> (of|in|and) [the] <NOUN>",
        "<NOUN> (to|for|in) <CITY>",
        "(dancing|walking|waiting|running|falling) (in|with|for) [the] <NOUN>",
        "(my|your|her|our) <ADJECTIVE> <NOUN>",
        "<NUMBER> <ADJECTIVE> <NOUN>s",
        "(goodbye|hello|dear) <FIRST>",
    ],
    "ADJECTIVE": _words(
        """blue, golden, broken, lonely, electric, silent, velvet, crimson, hollow, endless, summer, midnight, paper,
        frozen, wild, neon, burning, gentle, distant, sweet, stolen, faded, crooked, tender, restless, silver, heavy"""
    ),
    "NOUN": _words(
        """river, heart, shadow, mountain, dream, mirror, garden, highway, ocean, fire, candle, window, stranger, bird,
        train, moon, letter, storm, horizon, ghost, ribbon, anchor, lantern, harbor, feather, kingdom, thunder, echo"""
    ),
    "ARTIST": [
        "the <ADJECTIVE> <NOUN>s",
        "<FIRST> <LAST>",
        "<FIRST> and the <NOUN>s",
        "<NOUN> <NOUN>",
        "the <LAST> (band|trio)",
        "dj <FIRST>",
        "<ADJECTIVE> <FIRST>",
        "<CITY> <NOUN>s",
    ],
    "GENRE": _words(
        """[(classic|soft|indie|hard|folk|christian)] rock, [(smooth|cool|latin|gypsy)] jazz, [(delta|slow)] blues,
        reggae, [(old school|french|underground)] hip hop, [(outlaw|modern)] country, [(deep|acid)] house, techno,
        opera, salsa, [(baroque|modern)] classical, (death|heavy|doom) metal, (dream|synth|korean|city) pop,
        bluegrass, gospel, soul, funk, disco, ambient, (movie|game) soundtracks, lullabies, flamenco, samba,
        afrobeat, trance, dubstep, punk"""
    ),
    "PLAYLIST": [
        "<ADJECTIVE> (vibes|mix|hits|tunes|favorites)",
        "<LABEL> (mix|songs|jams)",
        "<WEEKDAY> (morning|night) (mix|jams)",
        "<GENRE> (favorites|mix|classics)",
        "<CITY> (road trip|nights)",
        "<FIRST> 's (mix|favorites|party)",
        "<NOUN> songs",
    ],
    # Invented names, so that no product is praised or blamed.
    "APP": _words(
        """tunely, streambox, melodia, audiona, songbird, chatterly, pingo, wavelet, talkspot, beamer, loopcast,
        vibefm, mixtape, hummingly, zipchat, relay, nimbus, postbird, quickly, sonar, echobox, radioland, grapevine,
        papertalk"""
    ),
    "DEVICE": _words(
        """(kitchen|bedroom|office|car|living room|garage) (speaker|phone|tablet), headset, speaker phone, land line,
        (work|home|old|spare) phone, watch, laptop, tv, (left|right|new) earbuds, intercom"""
    ),
}
