"""The house terms of a made-up service company, and the words its customers use instead.

Each pool holds separate wordings for training, validation and test. No wording is in two splits (a test sees
to it), so the test score measures whether a term was understood, not whether a sentence was remembered.
``{m}`` stands for the machine, ``{u}`` for serials, ``{s}`` for a site, ``{c}`` for a contact.
"""

from __future__ import annotations

from lightning_lora.sft.pools import pool

MACHINES = {  # house line -> what customers call such a machine
    "AQUA": pool(
        """pump|water pump|circulation pump|feed pump|sump pump|borehole pump|pump set|vacuum pump|main pump|
        pump unit|pumping plant|irrigation pump|lift pump|standby pump|small pump|pumping station|slurry pump|
        well pump|pump assembly""",
        "transfer pump|garden pump|rotary pump",
        """booster pump|drainage pump|dosing pump|pressure pump|fire pump|wash pump|submersible pump|
        centrifugal pump""",
    ),
    "AERO": pool(
        """compressor|air compressor|screw compressor|compressor unit|oil-free compressor|small compressor|
        rotary compressor|compressed-air plant|air unit|standby compressor|main compressor|turbo compressor|
        compressor station|compressed-air system|twin compressor|scroll compressor|compressor set|
        air supply unit|reciprocating compressor""",
        "mobile compressor|rental compressor|silent compressor",
        """piston compressor|workshop compressor|backup compressor|portable compressor|diesel compressor|
        two-stage compressor|central compressor|site compressor""",
    ),
    "CRYO": pool(
        """chiller|cooler|cooling unit|freezer|cold room|fridge unit|cooling system|deep freezer|
        process chiller|ice machine|refrigerator|refrigeration plant|freezer room|glycol chiller|plate freezer|
        cooling cabinet|cold storage room|chiller plant|small fridge|main chiller""",
        "cold store|shock freezer|drinks cooler",
        """water chiller|blast freezer|cooling plant|walk-in cooler|chest freezer|display fridge|air chiller|
        ice-water chiller""",
    ),
    "PYRO": pool(
        """boiler|burner|steam boiler|heater|hot-water boiler|furnace|oven|heating unit|heating system|
        air heater|boiler plant|gas burner|water heater|heating boiler|thermal-oil heater|baking oven|kiln|
        small boiler|main furnace|hot-air unit|standby boiler|steam generator""",
        "drying oven|fan heater|wood boiler",
        """gas boiler|oil burner|process heater|heating plant|pellet boiler|hot-air furnace|radiant heater|
        curing oven""",
    ),
}

TOPICS = {  # house topic -> how customers say it
    "outage": pool(
        """the {m} has stopped|the {m} won't start|our {m} shut down during the night|the {m} is dead|
        the {m} is down again|the {m} trips as soon as we switch it on|the {m} does not come on any more|
        the {m} cut out and stays off|nothing happens when we press start on the {m}|the {m} quit working|
        we cannot get the {m} running|the {m} broke down|the {m} refuses to start|
        the {m} keeps switching itself off|the {m} is not working at all|the {m} just died on us""",
        "the {m} failed and is not starting|we can't switch on the {m}",
        """the {m} stopped working this morning|the {m} will not start up|the {m} keeps shutting down|
        our {m} has gone dead|we can't get our {m} to run|the {m} has broken down|
        the {m} turned itself off and won't come back|the {m} gave up last night|there is no life in the {m}|
        the {m} is out of order""",
    ),
    "leak": pool(
        """the {m} is leaking|there is water under the {m}|the {m} drips oil|fluid is coming out of the {m}|
        there's a leak on the {m}|we found a puddle beneath the {m}|the shaft seal of the {m} leaks|
        the {m} is losing oil|something drips from the {m}|the floor around the {m} is wet|
        the gasket on the {m} lets water through|the {m} has a small leak|liquid runs down the {m}|
        there are oil stains below the {m}|the {m} loses water at the flange|
        coolant is escaping from the {m}""",
        "a wet patch showed up under the {m}|the {m} is dripping from a joint",
        """we noticed a leak at the {m}|oil is dripping from the {m}|the {m} leaks a lot of water|
        the seal on the {m} is leaking|there is a puddle of oil around the {m}|
        water is running out of the {m}|the {m} has sprung a leak|we have to mop up around the {m} every day|
        a pipe joint of the {m} leaks|oil comes out at the bottom of the {m}""",
    ),
    "noise": pool(
        """the {m} is very loud|the {m} makes a grinding noise|the {m} vibrates badly|
        there's a rattle in the {m}|the {m} squeals|strange sounds come from the {m}|
        the {m} shakes when running|we hear knocking in the {m}|the {m} hums louder than before|
        the {m} has a whining sound|the {m} is rattling|the noise of the {m} is unbearable|
        the {m} rumbles all day|there is a strong vibration on the {m}|the {m} screeches|
        a banging noise comes out of the {m}""",
        "the {m} got noisy|we feel the {m} shaking",
        """the {m} has started to rattle|a loud grinding sound comes from the {m}|
        the {m} is vibrating more each day|there is an odd knocking noise in the {m}|
        the {m} has become really noisy|the {m} whines and shakes|the {m} rattles when it starts|
        the {m} sounds as if something is loose|there is a loud humming from the {m}|
        the vibration of the {m} is getting worse""",
    ),
    "gauge": pool(
        """the {m} shows the wrong pressure|the display of the {m} reads too high|
        the temperature on the {m} is off|the {m} needs calibration|the sensor on the {m} gives false values|
        the gauge on the {m} does not agree with ours|readings from the {m} jump around|
        the {m} reports a value that can't be right|the meter of the {m} is inaccurate|
        the {m} measures too low|the numbers on the {m} make no sense|the {m} must be recalibrated|
        the {m} readout is wrong|the thermometer on the {m} is five degrees out|
        the pressure reading of the {m} is not correct|the probe in the {m} is off""",
        "the {m} indicates wrong figures|please calibrate the {m}",
        """the gauge of the {m} shows wrong values|the {m} has to be calibrated again|
        the display on the {m} is not accurate|sensor readings on the {m} are far too low|
        the {m} displays a false temperature|the {m} gives incorrect readings|
        the pressure that the {m} shows can't be true|the {m} sensor is out of tune|
        the values of the {m} are not plausible|the {m} measures the wrong temperature""",
    ),
    "delivery": pool(
        """the filter for the {m} has not arrived|where is our delivery for the {m}|
        the parcel with the {m} parts is missing|we are still waiting for the spare parts for the {m}|
        when will the {m} be delivered|tracking for the {m} kit says lost|
        the shipment for the {m} came to the wrong address|please tell us the delivery date of the {m}|
        the new seals for the {m} never came|the {m} order is overdue|
        our order for the {m} has not been shipped|the courier left the {m} parts at the wrong gate|
        only half of the {m} parts were in the box|the {m} we ordered was not delivered|
        the package for the {m} got lost|the truck with our {m} did not show up""",
        "no sign yet of the {m} parts we ordered|the {m} delivery did not come",
        """our delivery for the {m} is late|the spare part for the {m} was never shipped|
        where is the {m} we ordered|the parcel for the {m} still hasn't arrived|
        we are waiting for the shipment of {m} parts|the {m} kit was sent to the wrong place|
        the {m} has not been delivered yet|the carrier lost the box with the {m} filter|
        our {m} parts should have been here last week|any news about the delivery of the {m}""",
    ),
    "billing": pool(
        """the invoice for the {m} is wrong|you charged us twice for the {m}|
        we never got the bill for the {m}|please send a copy of the invoice for the {m}|
        the price on the {m} bill does not match the quote|we need a credit note for the {m}|
        the VAT on the {m} invoice is missing|the {m} repair was billed twice|we were overcharged for the {m}|
        the {m} bill lists hours nobody worked|we already paid for the {m} but got a reminder|
        please refund the payment for the {m}|the {m} invoice went to the wrong department|
        your bill for the {m} is too high|the account for the {m} shows a double payment|
        can you explain the costs on the {m} invoice""",
        "the sum invoiced for the {m} looks off|our payment for the {m} is not on the statement",
        """there is a mistake on the {m} invoice|we were billed two times for the {m}|
        please correct the bill for the {m}|the amount charged for the {m} is too high|
        we have not received an invoice for the {m}|the {m} bill has the wrong price|
        the invoice for the {m} shows the wrong amount|we paid for the {m} already|
        please cancel the second invoice for the {m}|the discount is missing on the {m} bill""",
    ),
}

URGENCIES = {  # house urgency -> how customers word it; a message that says nothing about it is for later
    "now": pool(
        """this is urgent|we need someone today|production is standing still|please come at once|
        it is an emergency|every hour costs us money|the whole plant is down|top priority please|
        call back immediately|we can't wait|asap please|help needed right now|
        the line is stopped because of this|this is critical|send somebody straight away|
        please hurry, customers are waiting|we need a technician today|come as fast as you can|
        we are losing money by the hour|the shift is standing idle|drop everything please|
        we cannot work at all until it is solved|at the earliest possible moment|today please, not tomorrow|
        it must be solved within the hour|nothing runs here any more|please react at once|
        an engineer is needed on the spot|it has the highest priority|everything here is at a halt|
        we can't do anything without it|send a fitter this very day|it has to be today|can anybody come today|
        a fitter must be here today|it cannot wait until tomorrow|we expect you today|not later than today|
        somebody must look at it before tonight|get here as soon as you can|as quickly as possible please|
        we are in serious trouble|work has come to a stop|the whole line has stopped|all work here has stopped|
        our output is zero until then|we have a real emergency here|handle it as an emergency|
        consider this an emergency|deal with it at once|right now please|this minute if you can|
        we need your people now|immediate action is needed|it is a matter of hours|we cannot go on like this today|
        the customer is at the door|it is dangerous as it is|people are sent home because of it|
        this comes before everything else|every minute counts|hurry up please|quick help is needed|
        no production without it|everybody is waiting for you""",
        "act now please|very urgent matter",
        """this is very urgent, please hurry|we need help immediately|production has stopped because of this|
        please treat this as an emergency|someone has to come today|we need this right away|
        it is extremely urgent|please send help now|we are at a complete standstill|this can't wait a single day""",
    ),
    "week": pool(
        """sometime this week would be good|please handle it in the next few days|we can manage until Friday|
        it should be done soon|before the weekend if possible|within the week please|
        we can work around it for a couple of days|by Thursday please|we can hold out for two or three days|
        it has to be done by the end of the week|please get to it before Monday|let's solve it this week|
        we need it within five days|tomorrow or the day after would do|early next week at the latest|
        please plan it for the coming days|some day this week|not today, but this week|
        we can do without it for a few days|please come on Tuesday or Wednesday|until Saturday at the latest|
        in two days would be perfect|it should not take longer than a week|before next week|
        we get by for the moment, but not for long|a visit on Friday would suit us|within three working days|
        soon, but it need not be today|by the weekend please|over the next days would help us|
        we have a spare one for three days|it must be fixed this week|it should be sorted by Friday|
        could you fit us in this week|at some point this week|a few days will not hurt|
        it holds until the weekend|we will manage for some days|Thursday or Friday would be fine|
        it has to be finished before the weekend|by the end of the week at the latest|
        please come within a few days|we can last until next Monday|we would like it done this week|
        it may take two or three days|before Saturday please|a couple of days is fine|
        tomorrow or on Thursday if you can|it should happen in the coming week|
        for the next days we have a replacement|not at once, but in the next days|
        give us a date this week|five days are all right|by Tuesday if possible|
        the weekend is our limit|until Monday we can do with the old one|it need not be now, but this week|
        let us have it by Wednesday evening|we can stand it for three or four days""",
        "by Wednesday would be great|we can bridge some days",
        """please sort it out this week|in the next couple of days please|we can cope until the weekend|
        it ought to be done before Friday|we need it by the end of this week|
        within the next few days would be good|it has to be ready by Friday|we need a visit this week|
        please do it before the weekend|it is enough if you come in two or three days""",
    ),
    "later": pool(
        """no rush|whenever it suits you|at the next regular visit is fine|not urgent|take your time|
        it can wait|no hurry from our side|when you are in the area|some time next month is ok|
        just so you know|there is no time pressure|it is a minor thing|low priority|
        do it with the yearly service|any time is fine|no need to hurry|please look at it when you pass by|
        please put it on the list for the yearly check|please leave it until your next round|
        there is plenty of time|it is not important|we are in no hurry|some day when it fits|
        it can be done next quarter|put it at the end of your list|it does not bother us much|
        only for your information|nothing urgent|we can live with it for now|no deadline from us|
        next year would do, too|together with the next inspection|we can wait for months|
        no reason to hurry|there is really no rush|it does not matter when|as and when you can|
        at the next routine service|with the next maintenance please|when your people are here anyway|
        some time in the next months|it is only a small flaw|we don't mind waiting|next month is early enough|
        wait for the regular service|it is fine to leave it for now|in your own time please|
        it has no priority for us|it may stay like this for a while|one day, when you have nothing else to do|
        it can be left until next month|there is no deadline|it need not be soon|
        no quick answer needed|just for the record|we only wanted to mention it|
        let's do it at the annual check|keep it for your next tour|when things are quiet on your side|
        this has all the time in the world|not in a hurry here""",
        "it is not pressing|at your convenience",
        """there is no hurry at all|this is not urgent for us|whenever you have time|
        it can wait until next month|please do it at the next service|there is no rush on this|
        take as long as you need|some day next month would be fine|you need not hurry|it is of low importance""",
    ),
}
