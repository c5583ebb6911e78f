"""The grammar of the semantic-parsing task: how people ask for things, in a small notation.

``(a|b)``: one of them; ``[a]``: or nothing; ``<RULE>``: one pattern of ``parse_values.RULES``; ``{SLOT}``: one pattern
of ``SLOTS``, bracketed as that slot; ``{IN:NAME}``: one pattern of ``NESTED``, bracketed as that intent. The texts are
this project's own, in the manner of TOPv2 (arXiv 2010.03546).
"""

__all__ = ["INTENTS", "NESTED", "SLOTS"]

# Every intent's patterns, by domain.
ALARM = {
    "CREATE_ALARM": [
        "(set|create|make|add|start) (an|a new|another) alarm {DATE_TIME}",
        "(set|create) an alarm (called|named|labeled) {ALARM_NAME} {DATE_TIME}",
        "wake me [up] {DATE_TIME}",
        "i (need|have|want) to (get up|wake up|be up) {DATE_TIME}",
        "{DATE_TIME} (set an alarm|wake me up|i need an alarm)",
        "(set|schedule) (a|my) {ALARM_NAME} alarm {DATE_TIME}",
        "(have|let) my alarm (go off|ring|buzz) {DATE_TIME}",
    ],
    "DELETE_ALARM": [
        "(delete|cancel|remove|get rid of|clear) (my|the) alarm {DATE_TIME}",
        "(turn off|switch off|kill) (my|the) {ALARM_NAME} alarm",
        "i (don't|do not) need (my|the) alarm {DATE_TIME} (anymore|any more)",
        "(delete|cancel) (my|the|all my) {ALARM_NAME} (alarm|alarms) [{DATE_TIME}]",
    ],
    "SNOOZE_ALARM": [
        "(snooze|delay|postpone) (my|the|this) alarm {DURATION}",
        "(snooze|hold) (my|the) {ALARM_NAME} alarm {DURATION}",
        "let me sleep {DURATION} (longer|more)",
    ],
    "GET_ALARM": [
        "(show|list|read|tell) me (my|the|all) alarms {DATE_TIME}",
        "(do i have|is there) an alarm [set] {DATE_TIME}",
        "when (does|will) my {ALARM_NAME} alarm (ring|go off)",
        "(what|which) alarms (are set|do i have) {DATE_TIME}",
    ],
    "UPDATE_ALARM": [
        "(change|move|switch) (my|the) {ALARM_NAME} alarm to {DATE_TIME}",
        "(push|shift|move) my alarm (back|forward|ahead) {DURATION}",
    ],
}
REMINDER = {
    "CREATE_REMINDER": [
        "remind {PERSON_REMINDED} to {TODO} {DATE_TIME}",
        "remind {PERSON_REMINDED} {DATE_TIME} to {TODO}",
        "(set|create|make|add) a reminder [for me] to {TODO} {DATE_TIME}",
        "{DATE_TIME} remind {PERSON_REMINDED} to {TODO}",
        "(don't let me forget|make sure i remember) to {TODO} [{DATE_TIME}]",
        "i (must|have to|need to) remember to {TODO} [{DATE_TIME}]",
        "(put|add) {TODO} (on|to) my (reminders|list|reminder list) [{DATE_TIME}]",
    ],
    "DELETE_REMINDER": [
        "(delete|cancel|remove|drop) (my|the) reminder to {TODO}",
        "(delete|cancel|clear) (my|all my|the) reminders {DATE_TIME}",
        "(stop reminding|don't remind) {PERSON_REMINDED} to {TODO}",
    ],
    "GET_REMINDER": [
        "(what|which) reminders do i have {DATE_TIME}",
        "(show|list|read) [me] my reminders {DATE_TIME}",
        "when (am i supposed|do i have|do i need) to {TODO}",
        "did i (set|make|add) a reminder to {TODO}",
    ],
    "UPDATE_REMINDER": [
        "(change|move|push) (my|the) reminder to {TODO} to {DATE_TIME_NEW}",
        "(reschedule|postpone) the reminder to {TODO} {DATE_TIME_NEW}",
    ],
}
WEATHER = {
    "GET_WEATHER": [
        "(what's|what is|how's|how is) the (weather|forecast) [like] in {LOCATION} [{DATE_TIME}]",
        "(will it|is it going to) {WEATHER_ATTRIBUTE} in {LOCATION} [{DATE_TIME}]",
        "(what's|what is) the weather [going to be] [like] {DATE_TIME}",
        "(do i need|should i (bring|take|pack|wear)) {CLOTHING} [in {LOCATION}] {DATE_TIME}",
        "{DATE_TIME} (what's|how's) the (weather|forecast) in {LOCATION}",
        "(give|show|tell) me the (weather|forecast|weather report) for {LOCATION} [{DATE_TIME}]",
        "how (hot|cold|warm|windy|humid) (will it be|is it) in {LOCATION} [{DATE_TIME}]",
    ],
    "GET_SUNRISE": [
        "(when|what time) (does|will) the sun (rise|come up) in {LOCATION} [{DATE_TIME}]",
        "sunrise [time] in {LOCATION} [{DATE_TIME}]",
    ],
    "GET_SUNSET": [
        "(when|what time) (does|will) the sun (set|go down) in {LOCATION} [{DATE_TIME}]",
        "how long (will it stay|is it) light in {LOCATION} [{DATE_TIME}]",
    ],
}
NAVIGATION = {
    "GET_DIRECTIONS": [
        "(give me|get|show me|i need) directions to {DESTINATION} [from {SOURCE}]",
        "(take|navigate|drive|guide) me to {DESTINATION} [{PATH_AVOID}]",
        "how (do|can) i get to {DESTINATION} [from {SOURCE}] [by {METHOD_TRAVEL}]",
        "(what's|find) the (fastest|best|quickest|shortest) (way|route) to {DESTINATION} [{PATH_AVOID}]",
        "directions from {SOURCE} to {DESTINATION} [{PATH_AVOID}]",
    ],
    "GET_ESTIMATED_DURATION": [
        "how long (will it take|does it take) to (get|drive|go) to {DESTINATION} [from {SOURCE}]",
        "how long is the (drive|trip|ride|walk) (from {SOURCE}|) to {DESTINATION} [{DATE_TIME_DEPARTURE}]",
        "how (far|many minutes) (away is|to) {DESTINATION} [by {METHOD_TRAVEL}]",
    ],
    "GET_ESTIMATED_ARRIVAL": [
        "(when|what time) will i (arrive|get|be) at {DESTINATION} if i leave [from {SOURCE}] {DATE_TIME_DEPARTURE}",
        "if i (leave|start) {DATE_TIME_DEPARTURE} when (do|will) i (reach|get to) {DESTINATION}",
    ],
    "GET_INFO_TRAFFIC": [
        "(how's|how is|what's) the traffic (on|near|around) {LOCATION} [{DATE_TIME}]",
        "(is there|any) (traffic|construction|an accident|a traffic jam) (on|near) {LOCATION} [{DATE_TIME}]",
        "(how's|how bad is) the traffic [on the way] (from {SOURCE}|) to {DESTINATION}",
    ],
    "GET_LOCATION": [
        "(where is|find|locate|show me) {DESTINATION}",
        "(find|search for|is there) (a|the closest|some) {CATEGORY_LOCATION} (near|around|close to|by) {LOCATION}",
    ],
}
MUSIC = {
    "PLAY_MUSIC": [
        "(play|put on|start|queue) {MUSIC_TRACK_TITLE} by {MUSIC_ARTIST_NAME} [on {MUSIC_PROVIDER}]",
        "(play|put on|i want to hear) [some] {MUSIC_GENRE} [music] [on {MUSIC_PROVIDER}]",
        "(play|start) (my|the) {MUSIC_PLAYLIST_TITLE} playlist [on {MUSIC_PROVIDER}]",
        "(play|put on) the album {MUSIC_ALBUM_TITLE} [by {MUSIC_ARTIST_NAME}]",
        "(let's|let me) (hear|listen to) [something by] {MUSIC_ARTIST_NAME}",
        "play (music|songs|something) by {MUSIC_ARTIST_NAME} (on|from|with) {MUSIC_PROVIDER}",
    ],
    "ADD_TO_PLAYLIST_MUSIC": [
        "(add|put|save) {MUSIC_TRACK_TITLE} (to|in|on) [my] {MUSIC_PLAYLIST_TITLE} [playlist]",
        "(add|save) (this|the) (song|track) by {MUSIC_ARTIST_NAME} to (my|the) {MUSIC_PLAYLIST_TITLE} playlist",
    ],
    "LIKE_MUSIC": [
        "i (like|love|really like) {MUSIC_TRACK_TITLE} [by {MUSIC_ARTIST_NAME}]",
        "(thumbs up for|like|favorite) {MUSIC_TRACK_TITLE} [by {MUSIC_ARTIST_NAME}]",
    ],
    "CREATE_PLAYLIST_MUSIC": [
        "(make|create|start) a [new] playlist (called|named|titled) {MUSIC_PLAYLIST_TITLE}",
        "(make|create) a {MUSIC_GENRE} playlist (called|named) {MUSIC_PLAYLIST_TITLE}",
    ],
    "SKIP_TRACK_MUSIC": ["skip (the next|ahead|forward) {NUMBER_TRACKS}", "(jump|go) (past|over) {NUMBER_TRACKS}"],
}
MESSAGING = {
    "SEND_MESSAGE": [
        "(text|message|tell|write) {RECIPIENT} [that] {CONTENT_EXACT}",
        "send {RECIPIENT} a (message|text|note) (saying|that says|that) {CONTENT_EXACT}",
        "(send|write) a (message|text) to {RECIPIENT} (saying|that says|that) {CONTENT_EXACT}",
        "(let {RECIPIENT} know|inform {RECIPIENT}) [that] {CONTENT_EXACT} [on {MESSAGING_APP}]",
        "(use|with) {MESSAGING_APP} [to] (tell|message|text) {RECIPIENT} [that] {CONTENT_EXACT}",
    ],
    "GET_MESSAGE": [
        "(read|show|open) [me] (my|the|any) (messages|texts) from {SENDER} [{DATE_TIME}]",
        "(did|has) {SENDER} (text|texted|message|messaged|write|written) me [{DATE_TIME}]",
        "what did {SENDER} (say|write|send me) [{DATE_TIME}] [on {MESSAGING_APP}]",
    ],
    "DELETE_MESSAGE": ["(delete|remove|erase) (the|all|my) (messages|texts|conversation) (from|with) {SENDER}"],
    "CREATE_CALL": [
        "(call|dial|ring|phone) {CONTACT} [on {CALL_METHOD}]",
        "(make|place|start) a (call|video call|phone call) (to|with) {CONTACT} [on {CALL_METHOD}]",
        "(get|put) {CONTACT} on the (phone|line)",
    ],
}
TIMER = {
    "CREATE_TIMER": [
        "(set|start|create|begin) a [new] timer {DURATION_FOR}",
        "(set|start) a {TIMER_NAME} timer {DURATION_FOR}",
        "(time|count down) {DURATION_BARE} [for (the|my) {TIMER_NAME}]",
    ],
    "ADD_TIME_TIMER": [
        "(add|put) {DURATION_BARE} (to|on) (my|the) {TIMER_NAME} timer",
        "(give|add) (my|the) timer {DURATION_BARE} more",
    ],
    "SUBTRACT_TIME_TIMER": ["(take|subtract|remove) {DURATION_BARE} (off|from) (my|the) [{TIMER_NAME}] timer"],
    "PAUSE_TIMER": ["(pause|stop|hold|freeze) (my|the) {TIMER_NAME} timer"],
    "GET_TIMER": ["how (much time|long) is left on (my|the) {TIMER_NAME} timer"],
}
EVENT = {
    "GET_EVENT": [
        "(what|any) {CATEGORY_EVENT} (are there|are happening|are on|is there) in {LOCATION} [{DATE_TIME}]",
        "(find|show me|look for|search for) {CATEGORY_EVENT} (in|near|around) {LOCATION} [{DATE_TIME}]",
        "(what's|what is) (happening|going on) in {LOCATION} {DATE_TIME}",
        "(is there|are there) {CATEGORY_EVENT} {DATE_TIME} (in|near) {LOCATION}",
        "when (is|does) {EVENT_NAME} (start|begin|open) [in {LOCATION}]",
    ],
    "CREATE_EVENT": [
        "(add|put|schedule|create) {EVENT_NAME} (on|to|in) my calendar {DATE_TIME}",
        "(schedule|plan|set up|book) {EVENT_NAME} with {ATTENDEE} {DATE_TIME} [at {EVENT_LOCATION}]",
        "(invite|add) {ATTENDEE} to {EVENT_NAME} [{DATE_TIME}]",
    ],
    "DELETE_EVENT": ["(cancel|delete|call off) {EVENT_NAME} [with {ATTENDEE}] {DATE_TIME}"],
}
INTENTS = ALARM | REMINDER | WEATHER | NAVIGATION | MUSIC | MESSAGING | TIMER | EVENT

# Intents inside slots.
NESTED = {
    "GET_LOCATION_HOME": ["{CONTACT} 's (house|place|home|apartment)", "the (house|place|home|apartment) of {CONTACT}"],
    "GET_LOCATION_WORK": ["{CONTACT} 's (office|work|workplace)", "where {CONTACT} works"],
    "GET_LOCATION": [
        "(the nearest|the closest|a) {CATEGORY_LOCATION} (in|near) {LOCATION}",
        "the {CATEGORY_LOCATION} on {LOCATION}",
    ],
    "SEND_MESSAGE": ["(text|message|write to|email) {RECIPIENT} (about|regarding) {TOPIC}", "text {RECIPIENT}"],
    "CREATE_CALL": ["(call|phone|ring) {CONTACT}", "call {CONTACT} back"],
    "GET_EVENT": ["{EVENT_NAME} (in|at) {LOCATION}", "{CATEGORY_EVENT} (in|near) {LOCATION}"],
    "GET_TIME": ["{EVENT_NAME} (starts|begins|ends|is over)"],
}
PEOPLE = ["<PERSON>"]
PLACES = ["<PLACE>", "<PLACE>", "<CITY_FULL>"]
GOALS = ["<POI>", "<PLACE>", "<CITY_FULL>", "<ADDRESS>", "{IN:GET_LOCATION_HOME}", "{IN:GET_LOCATION_WORK}"]
TIMES = ["<TIME>"]
SLOTS = {
    "DATE_TIME": [*TIMES * 9, "(before|after|when|as soon as) {IN:GET_TIME}"],
    "DATE_TIME_NEW": TIMES,
    "DATE_TIME_DEPARTURE": ["(at|around|by) <CLOCK>", "<DAY> at <CLOCK>", "in <SPAN>"],
    "ALARM_NAME": ["<LABEL>"],
    "TIMER_NAME": ["<DISH>", "<LABEL>"],
    "DURATION": ["(for|by) <SPAN>"],
    "DURATION_FOR": ["for <SPAN>"],
    "DURATION_BARE": ["<SPAN>"],
    "PERSON_REMINDED": ["me", "<PERSON>", "<PERSON>", "<PERSON> and <PERSON>"],
    "TODO": ["<TASK>", "<TASK>", "<TASK>", "{IN:SEND_MESSAGE}", "{IN:CREATE_CALL}", "go to {IN:GET_EVENT}"],
    "LOCATION": PLACES,
    "WEATHER_ATTRIBUTE": ["<SKY>"],
    "CLOTHING": ["<CLOTHES>"],
    "DESTINATION": [*GOALS, "{IN:GET_EVENT}", "{IN:GET_LOCATION}"],
    "SOURCE": GOALS,
    "PATH_AVOID": ["<AVOID>"],
    "METHOD_TRAVEL": ["<VEHICLE>"],
    "CATEGORY_LOCATION": ["<SHOP>"],
    "MUSIC_TRACK_TITLE": ["<TITLE>"],
    "MUSIC_ALBUM_TITLE": ["<TITLE>"],
    "MUSIC_ARTIST_NAME": ["<ARTIST>"],
    "MUSIC_GENRE": ["<GENRE>"],
    "MUSIC_PLAYLIST_TITLE": ["<PLAYLIST>"],
    "MUSIC_PROVIDER": ["<APP> [music|radio|premium]"],
    "NUMBER_TRACKS": ["<NUMBER> (songs|tracks|tunes)"],
    "RECIPIENT": [*PEOPLE * 3, "<PERSON> and <PERSON>", "the <GROUP> group"],
    "SENDER": PEOPLE,
    "CONTACT": PEOPLE,
    "ATTENDEE": [*PEOPLE, "<PERSON> and <PERSON>", "the <GROUP> team"],
    "CONTENT_EXACT": ["<NEWS>"],
    "TOPIC": ["<MATTER>"],
    "MESSAGING_APP": ["<APP> [messenger|chat]"],
    "CALL_METHOD": ["<APP> [call|video]", "(the|my) <DEVICE>"],
    "CATEGORY_EVENT": ["<SHOW>"],
    "EVENT_NAME": ["(the|my|our) <OCCASION>", "the <GROUP> (meeting|dinner|reunion|workshop|party)"],
    "EVENT_LOCATION": ["<POI>", "<ADDRESS>", "{IN:GET_LOCATION_HOME}", "{IN:GET_LOCATION_WORK}"],
}
# What surrounds a request; none of it is in the parse.
BEFORE = ["please", "hey", "can you", "could you please", "ok", "hi there", "would you", "i'd like you to", "um", "so"]
AFTER = ["please", "thanks", "thank you", "for me", "now", "if you can", "ok", "right away"]
